"""Signals and output of a command, handled before the imports that take seconds."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from experiments.errors import Preempted, UserError

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


def report(error: BaseException) -> int | None:
    """Prints an error that the user can correct, or an interruption, as one sentence.

    Returns:
      The exit status; None for an exception that is raised on.
    """
    if isinstance(error, UserError):
        return print_error(2, f"error: {error}")
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # such as a full or read-only disk
        message = f"{error.filename or 'input or output'}: {error.strerror}" if error.strerror else str(error)
        return print_error(2, f"error: {message}")
    if isinstance(error, Preempted):
        return print_error(PREEMPTED, f"preempted {error}; the same command resumes")
    if isinstance(error, KeyboardInterrupt):
        return print_error(INTERRUPTED, "interrupted: the same command resumes")
    return None  # run() handles a closed standard output


def print_error(status: int, line: str) -> int:
    """Prints a line to the standard error, and returns the status."""
    print(line, file=sys.stderr)
    return status


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
