"""How a run ends where it does not reach its end: in one sentence, never a traceback."""

import contextlib
import os

from lora_jax import reading as readers


class UserError(ValueError):
    """A missing file, an unknown name or malformed data; its message is one clear sentence. Exit status 2."""

    def __init__(self, message: str):
        super().__init__(readers.clipped(message))


class Preempted(BaseException):
    """The process was told to end (SIGTERM), and saved its state before; the same command resumes. Exit status 75.

    As a `KeyboardInterrupt`, it is no `Exception`: what catches any error on the way lets it pass.
    """


def reading(path: str | os.PathLike, form: str = "") -> contextlib.AbstractContextManager[None]:
    """Turns whatever the `with` block raises because of a file's content into a :class:`UserError` that names it."""
    return readers.reading(path, form, error=UserError)
