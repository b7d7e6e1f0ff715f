"""Signals and output of a command, handled before the imports that take seconds."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""The exit status of a run that SIGTERM ended; sysexits.h calls it EX_TEMPFAIL."""

INTERRUPTED = 130
"""The exit status after Ctrl-C, as a shell reports it."""


@contextmanager
def preemptible() -> Iterator[None]:
    """Ends the process with status 75 on SIGTERM, until the `with` block installs another handler."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        os.write(2, b"preempted before the first step: nothing to save; the same command starts again\n")
        os._exit(PREEMPTED)  # a module that is being imported could swallow an exception

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(name: str, main: Callable[[], int]) -> int:
    """Runs a command's `main` with any kind of standard output.

    Characters that the output's encoding lacks are printed as escapes. If the output is closed early (`| head`), the
    command ends with an error message and status 2.

    Args:
      name: The command, for messages.
      main: Returns the exit status.

    Returns:
      The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # pytest's capture does not have it
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the streams again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {name}: the standard output was closed before the end", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status
