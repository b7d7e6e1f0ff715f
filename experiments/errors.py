"""Exceptions that end a run with one sentence instead of a traceback."""

import contextlib
import os

from lora_jax import io


class UserError(ValueError):
    """An error that the user can correct, such as a missing file or malformed data. Exit status 2.

    The message is one sentence that says what was expected.
    """

    def __init__(self, message: str):
        super().__init__(io.shorten(message))


class Preempted(BaseException):
    """The process received SIGTERM and has saved its state; the same command resumes. Exit status 75.

    Like `KeyboardInterrupt` it is not an `Exception`, so that `except Exception` does not catch it.
    """


def reading(path: str | os.PathLike, form: str = "") -> contextlib.AbstractContextManager[None]:
    """Converts errors that a file's content causes in the `with` block to a :class:`UserError` that names the file."""
    return io.reading(path, form, error=UserError)
