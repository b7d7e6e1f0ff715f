"""Renders chat templates in a separate process, which bounds their time, memory and output."""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.errors import UserError

SECONDS = 10.0
"""Maximum CPU time for rendering one record."""

MEMORY = 1 << 30
"""Maximum bytes of the process's address space."""

_LONGEST, _GROWTH = 1_000_000, 100  # maximum characters of a rendering: a constant, and per character of its input

_REQUEST = 1 << 22  # characters to send at a time, unless a single group has more

_PROGRAM = Path(__file__).with_name("renderer.py")


class RenderingError(Exception):
    """A template raised an error for its messages, or exceeded a limit."""


class Renderer:
    """Renders a template.

    Args:
      source: Jinja source.
      where: The template's file, for error messages.
      today: The date that `strftime_now` formats.
      seconds: Maximum CPU time of a request.

    Attributes:
      has_generation: Whether the template has `{% generation %}` blocks.

    Raises:
      UserError: The source is not valid Jinja, or compiling it exceeds a limit.
    """

    def __init__(self, source: str, where: str, today: datetime, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize | None = None
        self._setup = {"source": source, "today": today.isoformat()}
        try:
            answer = self._start()
        except RenderingError as error:
            raise UserError(f"{where}: the chat template is not valid Jinja ({error})") from None
        self.has_generation: bool = answer["has_generation"]

    def render(
        self, groups: Sequence[Sequence[Mapping[str, Any]]], marks: Sequence[str]
    ) -> list[list[str | RenderingError]]:
        """Renders groups of calls.

        Args:
          groups: Groups of calls, each the variables of a rendering. The time limit applies to a group; if a group
            exceeds it, all of its results are errors.
          marks: See :class:`experiments.input.control.Marks`.

        Returns:
          The text or the error of each call.
        """
        results: list[list[str | RenderingError]] = [[] for _ in groups]
        requests: list[tuple[int, str]] = []
        for number, calls in enumerate(groups):
            try:
                variables = [json.dumps(call) for call in calls]
            except (RecursionError, TypeError, ValueError) as error:
                message = "nested too deeply" if isinstance(error, RecursionError) else error
                results[number] += [RenderingError(f"the messages are not valid JSON: {message}")] * len(calls)
                continue
            longest = _LONGEST + _GROWTH * max(map(len, variables), default=0)
            requests.append((number, f'{{"calls": [{", ".join(variables)}], "longest": {longest}}}'))
        while requests:
            sizes = itertools.accumulate(len(request) for _, request in requests)
            count = max(1, sum(size <= _REQUEST for size in sizes))
            answers = self._request({"marks": list(marks)}, [request for _, request in requests[:count]])
            for (number, _), answer in zip(requests, answers):
                if isinstance(answer, RenderingError):
                    results[number] += [answer] * len(groups[number])
                    continue
                results[number] += [
                    rendering["text"] if "text" in rendering else RenderingError(rendering["error"])
                    for rendering in answer["renderings"]
                ]
            requests = requests[len(answers) :]
        return results

    def _request(self, header: dict[str, Any], requests: Sequence[str] = ()) -> list[Any]:
        """Returns the answers to requests, up to the first that ends the process."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answers = []
        with contextlib.suppress(BrokenPipeError):  # the process has ended; reading its output reports that
            # The program reads all requests before it answers the first, so that neither side blocks.
            process.stdin.write("\n".join([json.dumps({**header, "count": len(requests)}), *requests, ""]))
            process.stdin.flush()
        for _ in range(max(len(requests), 1)):
            line = process.stdout.readline()
            if not line.endswith("\n"):
                return [*answers, RenderingError(self._exit_reason())]
            answer = json.loads(line)
            answers.append(RenderingError(answer["error"]) if "error" in answer else answer)
        return answers

    def _start(self) -> dict[str, Any]:
        command = [sys.executable, "-P", str(_PROGRAM), str(self._seconds), str(MEMORY)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="ascii")
        self._process, self._finalizer = process, weakref.finalize(self, _stop, process)
        (answer,) = self._request(self._setup)
        if isinstance(answer, RenderingError):
            raise answer
        return answer

    def _exit_reason(self) -> str:
        """Returns why the process has ended. The next call starts another one."""
        process, self._process = self._process, None
        assert process is not None and self._finalizer is not None
        status = process.wait()
        self._finalizer()
        if status == -signal.SIGPROF:
            return f"it takes more than {self._seconds:g} s"
        return f"its process ended with status {status}: the recursion is too deep, or it needs too much memory"


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # the process did not read all of its input
            if pipe is not None:
                pipe.close()
