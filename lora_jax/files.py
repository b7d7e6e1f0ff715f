"""Directories that are written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator


@contextlib.contextmanager
def replaced(directory: str | os.PathLike, manifest: str, *, what: str, keep: bool = False) -> Iterator[pathlib.Path]:
    """A new directory to write into, put in the place of `directory` when the block ends well.

    If it does not (an error, Ctrl-C), everything that was made is removed, new parents included.

    Args:
      directory: What is to be written. If it exists, it is empty or holds `manifest`. A link to a directory
        stays; what it leads to is replaced.
      manifest: The file by which a directory of the same kind is known.
      what: What such a directory is called in the error.
      keep: Whether other files of an existing directory stay: then only the files that were written are
        replaced, one after another, the manifest last.

    Raises:
      FileExistsError: The directory exists and is of another kind. Nothing is changed.
      OSError: It cannot be written; the error names `directory`, not what is made on the way.
    """
    given, directory = directory, pathlib.Path(os.path.realpath(directory))
    ours = (directory / manifest).is_file() or (directory.is_dir() and not any(directory.iterdir()))
    if os.path.lexists(directory) and not ours:
        raise FileExistsError(f"{directory} exists and is no {what} (it has no {manifest}); not replaced.")
    missing = [parent for parent in directory.parents if not parent.exists()]
    fresh = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.writing")
    whole = False
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if keep and directory.exists():
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == manifest):
                os.replace(file, directory / file.name)
        else:
            _exchange(fresh, directory)
        whole = True
    except OSError as error:
        # A write that fails has no file's name; others name what nobody has heard of.
        if error.errno is None or (error.filename is not None and not str(error.filename).startswith(str(fresh))):
            raise
        raise OSError(error.errno, error.strerror, str(given)) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in () if whole else missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _exchange(fresh: pathlib.Path, directory: pathlib.Path) -> None:
    """Puts a finished directory in place; one that was there is restored if that fails."""
    if not directory.exists():
        os.rename(fresh, directory)
        return
    old = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.replaced")
    try:
        os.rename(directory, old)
        os.rename(fresh, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise
    finally:
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
