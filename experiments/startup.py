"""How a command behaves from its first moment on: before anything that takes seconds is imported."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""The exit status of a run that was told to end (SIGTERM); sysexits.h calls it EX_TEMPFAIL."""

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
        os._exit(PREEMPTED)  # an exception may be swallowed by what is being imported

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(name: str, main: Callable[[], int]) -> int:
    """Runs a command's `main`, whatever its standard output is.

    Characters that the output's encoding lacks are printed as escapes. Where nobody reads the output any more
    (`| head`), the command ends with a sentence and status 2.

    Args:
      name: Of the command, for the sentence.
      main: Returns the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's capture is no text file
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the streams once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"error: {name}: the standard output was closed before the end", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status
