"""Locks on files and directories, which end with the process that holds them."""

import contextlib
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_DAY = 86_400


@contextlib.contextmanager
def locked(directory: pathlib.Path, *, shared: bool = False) -> Iterator[bool]:
    """Holds a lock on a directory against other processes and threads; yields False where there are no locks.

    The lock ends with the process, however that ends.
    """
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            except OSError:
                os.close(descriptor)
                descriptor = None
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_abandoned(parent: pathlib.Path, pattern: str) -> None:
    """Removes unfinished files and directories of processes that were killed, which hold no lock any more."""
    for path in matching(parent, pattern) if parent.is_dir() else ():
        with _unused(path) as unused:
            if not unused or path.is_symlink():
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def created(path: pathlib.Path, create: Callable[[], object]) -> Iterator[None]:
    """Creates a file or directory and holds a lock on it, by which :func:`remove_abandoned` knows that it is in use."""
    while True:
        create()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(path))
            except FileNotFoundError:
                continue
            if path.exists():  # else it was removed before it was locked
                yield
                return


def matching(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """The entries of a directory whose whole names match a pattern."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))


@contextlib.contextmanager
def _unused(path: pathlib.Path) -> Iterator[bool]:
    """Whether nobody holds a lock on a file or directory; where there are no locks, whether it is a day old."""
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unused = True
        else:
            unused = time.time() - path.lstat().st_mtime > _DAY
    except (BlockingIOError, FileNotFoundError):
        unused = False
    except OSError:  # no locks on this file system
        unused = time.time() - path.lstat().st_mtime > _DAY
    try:
        yield unused
    finally:
        if descriptor is not None:
            os.close(descriptor)
