"""A lock that allows one run at a time in a directory, names its holder, and ends with its process."""

import errno
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, LEASE = ".lora_jax.lock", ".lora_jax.lease"
RENEWED = 5.0
"""Seconds between renewals of a lease."""

EXPIRED = 30.0
"""Seconds without renewal after which a lease expires."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


@contextmanager
def hold_lock(directory: Path) -> Generator[None]:
    """A context that holds the lock of a directory, by `flock` or, if the file system does not support it, by a lease.

    A lease is a file that its holder renews. A lease that is not renewed while it is observed is replaced, so no clocks
    are compared.

    Raises:
      UserError: Another run holds the lock; the message names the host and the process.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(directory / LOCK, directory))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            stack.enter_context(_leased(directory / LEASE, directory))
        yield


@contextmanager
def _locked(path: Path, directory: Path) -> Generator[None]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            try:
                _flock(descriptor)
            except BlockingIOError:
                raise _in_use(directory, path) from None
            except OSError:
                path.unlink(missing_ok=True)
                raise
            if not _is_same_file(descriptor, path):  # the previous holder has removed it
                continue
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_holder()).encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _flock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _leased(path: Path, directory: Path) -> Generator[None]:
    holder = {**_holder(), "token": uuid.uuid4().hex}
    while not _create_lease(path, holder):
        _wait_until_expired(path, directory)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, holder, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        if _read(path) == holder:
            path.unlink(missing_ok=True)


def _create_lease(path: Path, holder: dict[str, Any]) -> bool:
    """Atomically creates a lease with its content; returns False if one exists."""
    fresh = path.with_name(f"{path.name}.{holder['token']}")
    fresh.write_text(json.dumps(holder), encoding="utf-8")
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    return True


def _wait_until_expired(path: Path, directory: Path) -> None:
    """Waits until a lease is removed, or removes it when it expires.

    Raises:
      UserError: Its holder renews it.
    """
    holder, stamp, end = _read(path), _stamp(path), time.monotonic() + EXPIRED
    while time.monotonic() < end:
        time.sleep(min(RENEWED, EXPIRED) / 4)
        if _stamp(path) is None:
            return
        if _stamp(path) != stamp:
            raise _in_use(directory, path)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:  # another run has created a lease meanwhile, which is restored
        os.link(aside, path)
        aside.unlink()
        raise _in_use(directory, path)
    aside.unlink()


def _renew(path: Path, holder: dict[str, Any], ended: threading.Event) -> None:
    """Renews a lease until the run ends; stops a run that has lost its lease, after a long sleep."""
    while not ended.wait(RENEWED):
        if _read(path) != holder:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid()}


def _in_use(directory: Path, path: Path) -> UserError:
    holder = _read(path)
    who = f"process {holder.get('process', '?')} on host {holder.get('host', '?')}"
    return UserError(f"{directory}: another run writes to it ({who}); wait until it ends, or choose another --out")
