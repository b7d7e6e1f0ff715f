"""Exceptions that end a run with one sentence instead of a traceback."""

import contextlib
import os
from collections.abc import Generator

# lora_jax is imported late, since its import takes seconds: settings and data are checked before.

_SHORT = 1000  # characters of a message that has no line to shorten


class UserError(ValueError):
    """An error that the user can correct, such as a missing file or malformed data. Exit status 2.

    The message is one sentence that says what was expected.
    """

    def __init__(self, message: str):
        if len(message) > _SHORT:
            from lora_jax import io

            message = io.shorten(message)
        super().__init__(message)


class Preempted(BaseException):
    """The process received SIGTERM and has saved its state; the same command resumes. Exit status 75.

    Like `KeyboardInterrupt` it is not an `Exception`, so that `except Exception` does not catch it.
    """


@contextlib.contextmanager
def reading(path: str | os.PathLike, form: str = "") -> Generator[None]:
    """Converts errors that a file's content causes in the `with` block to a :class:`UserError` that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Preempted):
        raise
    except BaseException:  # a panic of Rust is not an Exception
        from lora_jax import io

        with io.reading(path, form, error=UserError):
            raise
