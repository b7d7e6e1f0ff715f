"""Atomic replacement of files and directories, which never removes the files of another program."""

import contextlib
import ctypes
import errno
import functools
import os
import pathlib
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator

from lora_jax.io.locks import create_locked, match_entries, remove_abandoned

_UNFINISHED = r"\.(.+\.)?[0-9a-f]{32}\.(writing|replaced)(\..+)?"
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # from fcntl.h, linux/fs.h and sys/stdio.h


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new file to write, which replaces `path` in one atomic rename if the block ends without an error.

    Args:
      path: A file, which need not exist. A symbolic link is an error: it is neither followed nor replaced.

    Raises:
      FileExistsError: `path` is a link or a directory.
      OSError: The file cannot be written; the error names `path`.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "result.json"
      >>> with replace_file(file) as fresh:
      ...     size = fresh.write_text("{}")
      >>> file.read_text()
      '{}'
    """
    path = pathlib.Path(path)
    if path.is_symlink() or path.is_dir():
        kind = "is a link" if path.is_symlink() else "is a directory"
        raise FileExistsError(errno.EEXIST, f"{kind}, expected a file", str(path))
    remove_abandoned(path.parent, rf"\.[0-9a-f]{{32}}\.writing\.{re.escape(path.name)}")
    fresh = path.with_name(f".{uuid.uuid4().hex}.writing.{path.name}")
    with errors_naming(path, fresh):
        try:
            with create_locked(fresh, fresh.touch):
                yield fresh
                sync(fresh)
                os.replace(fresh, path)
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_directory(
    directory: str | os.PathLike,
    manifest: str,
    *,
    what: str,
    owns: Callable[[pathlib.Path], bool],
    keep: bool = False,
) -> Iterator[pathlib.Path]:
    """Yields a new directory to write into, which replaces `directory` if the block ends without an error.

    The replacement is one atomic exchange if the platform supports it. On other platforms :func:`recover` completes the
    replacement of a killed process. After an error everything new is removed, including new parents.

    Args:
      directory: A new or empty directory, or one that this program has written. A link to a directory is followed.
      manifest: The file that identifies a directory of this kind. It is written last.
      what: The kind, for error messages.
      owns: Whether a file of an existing directory was written by this program.
      keep: Whether other entries stay in the directory; otherwise they are an error.

    Raises:
      FileExistsError: The directory holds files of other programs, or is a file. Nothing is changed.
      OSError: The directory cannot be written; the error names `directory`.
    """
    target = resolve(directory)
    recover(target)
    check_replaceable(target, manifest, what=what, owns=owns, names={manifest} if keep else None)
    unfinished = rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.writing"
    # A working directory and a mount point cannot be exchanged; their entries are replaced.
    in_place = target.is_dir() and (os.path.ismount(target) or _holds_working_directory(target) or not _entries(target))
    folder = target if in_place else target.parent
    remove_abandoned(folder, unfinished)
    fresh = folder / f".{target.name}.{uuid.uuid4().hex}.writing"
    with errors_naming(directory, fresh), create_parents(fresh):
        try:
            with create_locked(fresh, fresh.mkdir):
                yield fresh
                sync_tree(fresh)
                names = {entry.name for entry in fresh.iterdir()}
                check_replaceable(target, manifest, what=what, owns=owns, names=names if keep else None)
                _commit(fresh, target, manifest, owns, in_place=in_place)
            sync(target)
            sync(target.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def check_replaceable(
    directory: pathlib.Path,
    manifest: str,
    *,
    what: str,
    owns: Callable[[pathlib.Path], bool],
    names: Collection[str] | None = None,
) -> None:
    """Raises `FileExistsError` unless :func:`replace_directory` may write a directory.

    Args:
      directory: As for :func:`replace_directory`, like `manifest`, `what` and `owns`.
      names: The entries to write, if others may stay; None if all entries must be this program's.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is not a directory; only a previous {what} is replaced.")
    entries = _entries(directory)
    if entries and not (directory / manifest).is_file():
        raise FileExistsError(f"{directory} exists and has no {manifest}; only a previous {what} is replaced.")
    others = [entry for entry in entries if (names is None or entry.name in names) and not _is_owned(entry, owns)]
    if others:
        shown = join_names([f"{entry.name}/" if entry.is_dir() else entry.name for entry in others])
        raise FileExistsError(
            f"{directory} contains entries that lora_jax did not write ({shown}), so it is not replaced."
        )


def resolve(directory: str | os.PathLike) -> pathlib.Path:
    """Returns a path without links; the directory need not exist.

    Raises:
      FileExistsError: The path is a broken or circular link.
    """
    if os.path.islink(directory) and not os.path.exists(directory):
        raise FileExistsError(f"{os.fspath(directory)}: a broken or circular link.")
    return pathlib.Path(os.path.realpath(directory))


def recover(directory: str | os.PathLike) -> None:
    """Restores a directory that a killed process had renamed and not yet replaced.

    This can happen only on platforms without an atomic exchange.
    """
    directory = pathlib.Path(directory)
    if os.path.lexists(directory) or not directory.parent.is_dir():
        return
    for renamed in match_entries(directory.parent, rf"\.{re.escape(directory.name)}\.[0-9a-f]{{32}}\.replaced"):
        with contextlib.suppress(OSError):  # another process may have restored it
            os.rename(renamed, directory)
            return


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two directories atomically; returns False if the platform or the file system cannot."""
    swap = _exchange_function()
    if swap is None:
        return False
    if swap(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def sync(path: pathlib.Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: pathlib.Path) -> None:
    """Applies :func:`sync` to a directory and everything in it."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(pathlib.Path(folder, name))
        sync(pathlib.Path(folder))


def join_names(names: Collection[str], limit: int = 5) -> str:
    """Joins names on one line; beyond the limit it gives their number."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more


@contextlib.contextmanager
def create_parents(path: pathlib.Path) -> Iterator[None]:
    """Creates the parents of a path; an error in the block removes them again, unless they hold files."""
    missing = [parent for parent in path.parents if not parent.exists()]
    if not path.parents[len(missing)].is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _commit(
    fresh: pathlib.Path, target: pathlib.Path, manifest: str, owns: Callable[[pathlib.Path], bool], *, in_place: bool
) -> None:
    """Replaces a directory by a finished one."""
    if not target.exists():
        os.rename(fresh, target)
        return
    owned = {entry.name for entry in _entries(target) if _is_owned(entry, owns)}
    others = [entry for entry in _entries(target) if entry.name not in owned]
    if in_place or not _link_entries(others, fresh):
        _replace_entries(fresh, target, manifest, owned)
        return
    if exchange(fresh, target):
        old = fresh
    else:
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.replaced")
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(old, target)
            raise
    for entry in _entries(old):  # entries that other programs have created or changed meanwhile stay
        current = target / entry.name
        if entry.name not in owned and not (current.exists() and current.samefile(entry)):
            os.rename(entry, current)
    shutil.rmtree(old, ignore_errors=True)


def _link_entries(entries: Collection[pathlib.Path], fresh: pathlib.Path) -> bool:
    """Links files into the new directory; False if an entry is not a file or the file system has no hard links."""
    if not all(entry.is_file() and not entry.is_symlink() for entry in entries):
        return False
    try:
        for entry in entries:
            os.link(entry, fresh / entry.name)
    except OSError:
        return False
    return True


def _replace_entries(fresh: pathlib.Path, target: pathlib.Path, manifest: str, owned: set[str]) -> None:
    """Replaces files one by one. The manifest is removed first, so that a partial replacement has none."""
    if manifest in owned:
        (target / manifest).unlink()
    new = sorted(fresh.iterdir(), key=lambda entry: entry.name == manifest)
    for entry in new:
        os.replace(entry, target / entry.name)
    for name in owned - {entry.name for entry in new} - {manifest}:
        (target / name).unlink()


def _is_owned(entry: pathlib.Path, owns: Callable[[pathlib.Path], bool]) -> bool:
    return not entry.is_symlink() and not entry.is_dir() and owns(entry)


def _entries(directory: pathlib.Path) -> list[pathlib.Path]:
    """The entries of a directory, folders first, without unfinished files and directories of this module."""
    entries = [entry for entry in directory.iterdir() if not re.fullmatch(_UNFINISHED, entry.name)]
    return sorted(entries, key=lambda entry: (not entry.is_dir(), entry.name))


def _holds_working_directory(directory: pathlib.Path) -> bool:
    current = pathlib.Path(os.path.realpath(os.curdir))
    return current == directory or directory in current.parents


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike, fresh: pathlib.Path) -> Iterator[None]:
    """Makes errors of the operating system about paths within `fresh` name `path`, the argument of the caller."""
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and not str(error.filename).startswith(str(fresh))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@functools.cache
def _exchange_function() -> Callable[[bytes, bytes], int] | None:
    """The C library's exchange of two paths: `renameat2` on Linux, `renamex_np` on macOS."""
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if function is None:
        return None
    if name == "renameat2":
        return lambda one, other: function(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE)
    return lambda one, other: function(one, other, _RENAME_SWAP)
