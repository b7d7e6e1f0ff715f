"""Directories that are written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(directory: str | os.PathLike, manifest: str, *, what: str) -> Iterator[pathlib.Path]:
    """A new directory to write into, put in the place of `directory` when the block ends well.

    Args:
      directory: What is to be written. If it exists, it is empty or holds `manifest`.
      manifest: The file by which a directory of the same kind is known.
      what: What such a directory is called in the error.

    Raises:
      FileExistsError: The directory exists and is of another kind. Nothing is changed.
    """
    directory = pathlib.Path(directory).absolute()
    ours = (directory / manifest).is_file() or (directory.is_dir() and not any(directory.iterdir()))
    if directory.exists() and not ours:
        raise FileExistsError(f"{directory} exists and is no {what} (it has no {manifest}); not replaced.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.writing")
    try:
        fresh.mkdir()
        yield fresh
        _exchange(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exchange(fresh: pathlib.Path, directory: pathlib.Path) -> None:
    """Puts a finished directory in place; one that was there is restored if that fails."""
    if not directory.exists():
        os.rename(fresh, directory)
        return
    old = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.replaced")
    os.rename(directory, old)
    try:
        os.rename(fresh, directory)
    except OSError:
        os.rename(old, directory)
        raise
    shutil.rmtree(old)
