"""Chat templates rendered in a process of their own, which bounds their time, memory and output."""

import contextlib
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
      variables: The names of the variables that the template reads.

    Raises:
      UserError: It is no Jinja template, or its compilation exceeds a limit.
    """

    def __init__(self, source: str, where: str, today: datetime, seconds: float = SECONDS):
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: weakref.finalize | None = None
        self._first = json.dumps({"source": source, "today": today.isoformat()})
        try:
            answer = self._start()
        except RenderingError as error:
            raise UserError(f"{where}: the chat template is not valid Jinja ({error})") from None
        self.has_generation: bool = answer["has_generation"]
        self.variables: frozenset[str] = frozenset(answer["variables"])

    def render(self, calls: Sequence[Mapping[str, Any]], marks: Sequence[str]) -> list[str | RenderingError]:
        """The text of each call, or why there is none.

        Args:
          calls: The variables of each rendering.
          marks: See :class:`experiments.input.control.Marks`.

        Raises:
          RenderingError: The calls together exceed a limit, or they are no JSON.
        """
        try:
            variables = [json.dumps(call) for call in calls]
        except (RecursionError, TypeError, ValueError) as error:
            message = "nested too deeply" if isinstance(error, RecursionError) else error
            raise RenderingError(f"the messages are no JSON: {message}") from None
        longest = _LONGEST + _GROWTH * max(map(len, variables), default=0)
        request = f'{{"calls": [{", ".join(variables)}], "marks": {json.dumps(list(marks))}, "longest": {longest}}}'
        if self._process is None:
            self._start()
        answer = self._asked(request)
        return [one["text"] if "text" in one else RenderingError(one["error"]) for one in answer["renderings"]]

    def _start(self) -> dict[str, Any]:
        command = [sys.executable, "-P", str(_PROGRAM), str(self._seconds), str(MEMORY)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="ascii")
        self._process, self._end = process, weakref.finalize(self, _stop, process)
        return self._asked(self._first)

    def _asked(self, request: str) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        line = ""
        try:
            process.stdin.write(f"{request}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended: its status says why
        if not line.endswith("\n"):
            raise RenderingError(self._ended())
        answer = json.loads(line)
        if "error" in answer:
            raise RenderingError(answer["error"])
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
