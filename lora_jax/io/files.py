"""Files and directories that are replaced atomically, and never at the cost of another program's files."""

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

from lora_jax.io.locks import created, matching, remove_abandoned

_UNFINISHED = r"\.(.+\.)?[0-9a-f]{32}\.(writing|replaced)(\..+)?"
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # from fcntl.h, linux/fs.h and sys/stdio.h


@contextlib.contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new file to write, which replaces `path` by one atomic rename when the block ends without an error.

    Args:
      path: A file or nothing. A symbolic link is refused: it is neither followed nor replaced.

    Raises:
      FileExistsError: `path` is a link or a directory.
      OSError: It cannot be written; the error names `path`.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "result.json"
      >>> with replaced_file(file) as fresh:
      ...     size = fresh.write_text("{}")
      >>> file.read_text()
      '{}'
    """
    path = pathlib.Path(path)
    if path.is_symlink() or path.is_dir():
        kind = "is a link" if path.is_symlink() else "is a directory"
        raise FileExistsError(errno.EEXIST, f"{kind}, which is not replaced", str(path))
    remove_abandoned(path.parent, rf"\.[0-9a-f]{{32}}\.writing\.{re.escape(path.name)}")
    fresh = path.with_name(f".{uuid.uuid4().hex}.writing.{path.name}")
    with naming(path, fresh):
        try:
            with created(fresh, fresh.touch):
                yield fresh
                sync(fresh)
                os.replace(fresh, path)
            sync(path.parent)
        finally:
            fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced(
    directory: str | os.PathLike,
    manifest: str,
    *,
    what: str,
    owns: Callable[[pathlib.Path], bool],
    keep: bool = False,
) -> Iterator[pathlib.Path]:
    """A new directory to write into, which replaces `directory` when the block ends without an error.

    The replacement is one atomic exchange where the platform has it; elsewhere :func:`recover` completes what a
    killed process began. After an error everything new is removed, including new parents.

    Args:
      directory: New, empty, or written by this program before. A link to a directory stays; the rules apply to the
        directory that it leads to.
      manifest: The file that makes the directory one of its kind. It appears last.
      what: The kind, for errors.
      owns: Whether a file of an existing directory was written by this program.
      keep: Whether other entries stay in the directory; otherwise they are an error.

    Raises:
      FileExistsError: The directory holds files of others, or is a file. Nothing is changed.
      OSError: It cannot be written; the error names `directory`.
    """
    target = resolved(directory)
    recover(target)
    check_replaceable(target, manifest, what=what, owns=owns, names={manifest} if keep else None)
    unfinished = rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}\.writing"
    # A directory in which somebody works, or on which a disk is mounted, stays where it is.
    inside = target.is_dir() and (os.path.ismount(target) or _holds_working_directory(target) or not _entries(target))
    folder = target if inside else target.parent
    remove_abandoned(folder, unfinished)
    fresh = folder / f".{target.name}.{uuid.uuid4().hex}.writing"
    with naming(directory, fresh), new_parents(fresh):
        try:
            with created(fresh, fresh.mkdir):
                yield fresh
                sync_tree(fresh)
                names = {entry.name for entry in fresh.iterdir()}
                check_replaceable(target, manifest, what=what, owns=owns, names=names if keep else None)
                _commit(fresh, target, manifest, owns, inside)
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
    """Raises `FileExistsError` unless :func:`replaced` may write a directory.

    Args:
      directory: See :func:`replaced`, like `manifest`, `what` and `owns`.
      names: Entries that will be written, if others may stay; None if all entries have to be this program's.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} exists and is no {what}; nothing replaces it.")
    entries = _entries(directory)
    if entries and not (directory / manifest).is_file():
        raise FileExistsError(f"{directory} exists and is no {what} (it has no {manifest}); nothing replaces it.")
    others = [entry for entry in entries if (names is None or entry.name in names) and not _owned(entry, owns)]
    if others:
        shown = listed([f"{entry.name}/" if entry.is_dir() else entry.name for entry in others])
        raise FileExistsError(f"{directory} holds what lora_jax did not write ({shown}); nothing replaces it.")


def resolved(directory: str | os.PathLike) -> pathlib.Path:
    """The directory that a path leads to, which need not exist.

    Raises:
      FileExistsError: The path is a link that leads nowhere, or in a circle.
    """
    if os.path.islink(directory) and not os.path.exists(directory):
        raise FileExistsError(f"{os.fspath(directory)}: a link that leads nowhere, or in a circle.")
    return pathlib.Path(os.path.realpath(directory))


def recover(directory: str | os.PathLike) -> None:
    """Puts back a directory that a process moved aside and, being killed, did not replace.

    Only where the platform has no atomic exchange can there be one.
    """
    directory = pathlib.Path(directory)
    if os.path.lexists(directory) or not directory.parent.is_dir():
        return
    for aside in matching(directory.parent, rf"\.{re.escape(directory.name)}\.[0-9a-f]{{32}}\.replaced"):
        with contextlib.suppress(OSError):  # another process may be faster
            os.rename(aside, directory)
            return


def exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swaps two directories atomically; False where the platform or the file system cannot."""
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
    """Makes a file or a directory's entries survive a power failure, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: pathlib.Path) -> None:
    """:func:`sync` for a directory and everything in it."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(pathlib.Path(folder, name))
        sync(pathlib.Path(folder))


def listed(names: Collection[str], limit: int = 5) -> str:
    """Names on one line: the first ones, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more


@contextlib.contextmanager
def new_parents(path: pathlib.Path) -> Iterator[None]:
    """Makes the parents of a path; after an error those that were made are removed again, unless they hold files."""
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
    fresh: pathlib.Path, target: pathlib.Path, manifest: str, owns: Callable[[pathlib.Path], bool], inside: bool
) -> None:
    """Puts a finished directory in place of another."""
    if not target.exists():
        os.rename(fresh, target)
        return
    written = {entry.name for entry in _entries(target) if _owned(entry, owns)}
    others = [entry for entry in _entries(target) if entry.name not in written]
    if inside or not _linked(others, fresh):
        _move_in(fresh, target, manifest, written)
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
    for entry in _entries(old):  # what appeared or changed in the meantime is not this program's to remove
        here = target / entry.name
        if entry.name not in written and not (here.exists() and here.samefile(entry)):
            os.rename(entry, here)
    shutil.rmtree(old, ignore_errors=True)


def _linked(entries: Collection[pathlib.Path], fresh: pathlib.Path) -> bool:
    """Links files into the new directory too; False if an entry is no file or the file system has no links."""
    if not all(entry.is_file() and not entry.is_symlink() for entry in entries):
        return False
    try:
        for entry in entries:
            os.link(entry, fresh / entry.name)
    except OSError:
        return False
    return True


def _move_in(fresh: pathlib.Path, target: pathlib.Path, manifest: str, written: set[str]) -> None:
    """Replaces files one by one; without a manifest, a killed process leaves no mixture of two."""
    if manifest in written:
        (target / manifest).unlink()
    new = sorted(fresh.iterdir(), key=lambda entry: entry.name == manifest)
    for entry in new:
        os.replace(entry, target / entry.name)
    for name in written - {entry.name for entry in new} - {manifest}:
        (target / name).unlink()


def _owned(entry: pathlib.Path, owns: Callable[[pathlib.Path], bool]) -> bool:
    return not entry.is_symlink() and not entry.is_dir() and owns(entry)


def _entries(directory: pathlib.Path) -> list[pathlib.Path]:
    """What is in a directory, folders first; unfinished work of this module does not count."""
    entries = [entry for entry in directory.iterdir() if not re.fullmatch(_UNFINISHED, entry.name)]
    return sorted(entries, key=lambda entry: (not entry.is_dir(), entry.name))


def _holds_working_directory(directory: pathlib.Path) -> bool:
    here = pathlib.Path(os.path.realpath(os.curdir))
    return here == directory or directory in here.parents


@contextlib.contextmanager
def naming(path: str | os.PathLike, fresh: pathlib.Path) -> Iterator[None]:
    """Errors of the operating system about a path within `fresh` name `path`, which is what the caller knows."""
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
