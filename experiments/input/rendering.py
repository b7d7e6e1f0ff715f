"""Chat templates rendered in a process of their own, which bounds their time, memory and output."""

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
"""Of computing that the renderings of one record may take."""

MEMORY = 1 << 30
"""Bytes that the process may map."""

_LONGEST, _GROWTH = 1_000_000, 100  # characters that any rendering may have, and for each character of its input

_REQUEST = 1 << 22  # characters that are sent at a time, but for a group that has more

_PROGRAM = Path(__file__).with_name("renderer.py")


class RenderingError(Exception):
    """A template refuses its messages, or exceeds a limit; says why."""


class Renderer:
    """Renders a template.

    Args:
      source: In Jinja.
      where: The file it is from, for errors.
      today: The date that `strftime_now` gives.
      seconds: Of computing that one call may take.

    Attributes:
      has_generation: Whether the template has `{% generation %}` blocks.

    Raises:
      UserError: It is no Jinja template, or its compilation exceeds a limit.
    """

    def __init__(self, source: str, where: str, today: datetime, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None
        self._first = {"source": source, "today": today.isoformat()}
        try:
            answer = self._start()
        except RenderingError as error:
            raise UserError(f"{where}: the chat template is not valid Jinja ({error})") from None
        self.has_generation: bool = answer["has_generation"]

    def render(
        self, groups: Sequence[Sequence[Mapping[str, Any]]], marks: Sequence[str]
    ) -> list[list[str | RenderingError]]:
        """The text of each call, or why there is none.

        Args:
          groups: Of calls: the variables of each rendering. The limit on time is that of a group; one that exceeds it
            has errors only.
          marks: See :class:`experiments.input.control.Marks`.
        """
        results: list[list[str | RenderingError]] = [[] for _ in groups]
        requests: list[tuple[int, str]] = []
        for number, calls in enumerate(groups):
            try:
                variables = [json.dumps(call) for call in calls]
            except (RecursionError, TypeError, ValueError) as error:
                message = "nested too deeply" if isinstance(error, RecursionError) else error
                results[number] += [RenderingError(f"the messages are no JSON: {message}")] * len(calls)
                continue
            longest = _LONGEST + _GROWTH * max(map(len, variables), default=0)
            requests.append((number, f'{{"calls": [{", ".join(variables)}], "longest": {longest}}}'))
        while requests:
            sizes = itertools.accumulate(len(request) for _, request in requests)
            count = max(1, sum(size <= _REQUEST for size in sizes))
            answers = self._asked({"marks": list(marks)}, [request for _, request in requests[:count]])
            for (number, _), answer in zip(requests, answers):
                if isinstance(answer, RenderingError):
                    results[number] += [answer] * len(groups[number])
                    continue
                for one in answer["renderings"]:
                    results[number].append(one["text"] if "text" in one else RenderingError(one["error"]))
            requests = requests[len(answers) :]
        return results

    def _asked(self, header: dict[str, Any], requests: Sequence[str] = ()) -> list[Any]:
        """The answers to requests, up to the first that ends the process."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answers = []
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its output tells too
            # The program reads all requests before it answers the first: neither waits for the other.
            process.stdin.write("\n".join([json.dumps({**header, "count": len(requests)}), *requests, ""]))
            process.stdin.flush()
        for _ in range(max(len(requests), 1)):
            line = process.stdout.readline()
            if not line.endswith("\n"):
                return [*answers, RenderingError(self._ended())]
            answer = json.loads(line)
            answers.append(RenderingError(answer["error"]) if "error" in answer else answer)
        return answers

    def _start(self) -> dict[str, Any]:
        command = [sys.executable, "-P", str(_PROGRAM), str(self._seconds), str(MEMORY)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="ascii")
        self._process, self._end = process, weakref.finalize(self, _stop, process)
        (answer,) = self._asked(self._first)
        if isinstance(answer, RenderingError):
            raise answer
        return answer

    def _ended(self) -> str:
        """Why the process has ended; the next call starts another one."""
        process, self._process = self._process, None
        assert process is not None and self._end is not None
        status = process.wait()
        self._end()
        if status == -signal.SIGPROF:
            return f"it computes for more than {self._seconds:g} s"
        return f"it ended the process that renders it, status {status}: too deep a recursion, or too much memory"


def _stop(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # of a request that it did not read to the end
            if pipe is not None:
                pipe.close()
