"""Locks on files and directories, which are released when the process that holds them ends."""

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
def lock(directory: pathlib.Path, *, shared: bool = False) -> Iterator[bool]:
    """Holds a lock on a directory against other processes and threads; yields False if locks are not supported.

    The operating system releases the lock if the process is killed.
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
    """Removes unfinished files and directories of killed processes, which no longer hold a lock."""
    for path in match_entries(parent, pattern) if parent.is_dir() else ():
        with _unused(path) as unused:
            if not unused or path.is_symlink():
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def create_locked(path: pathlib.Path, create: Callable[[], object]) -> Iterator[None]:
    """Creates a file or directory and holds a lock on it, so that :func:`remove_abandoned` does not remove it."""
    while True:
        create()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock(path))
            except FileNotFoundError:
                continue
            if path.exists():  # otherwise it was removed before it was locked
                yield
                return


def match_entries(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """Returns the entries of a directory whose whole names match a pattern."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))


@contextlib.contextmanager
def _unused(path: pathlib.Path) -> Iterator[bool]:
    """Yields whether no lock on a file or directory is held; if locks are not supported, whether it is a day old."""
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
