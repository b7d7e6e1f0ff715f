"""One run at a time in a directory: a lock that names its holder, and that a killed process does not keep."""

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
"""Seconds after which a lease that was not renewed is nobody's."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF)


@contextmanager
def held(directory: Path) -> Generator[None]:
    """Holds the lock of a directory for the `with` block: by `flock`, or by a lease where the file system has none.

    A lease is a file that its holder renews. One that nobody renews while it is watched is taken over, so that no
    clocks are compared.

    Raises:
      UserError: Another run holds it; the message names the host and the process.
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
            if not _is(descriptor, path):  # the holder before removed it meanwhile
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


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _leased(path: Path, directory: Path) -> Generator[None]:
    holder = {**_holder(), "token": uuid.uuid4().hex}
    while not _created(path, holder):
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


def _created(path: Path, holder: dict[str, Any]) -> bool:
    """Makes a lease unless there is one; it appears with its content."""
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
    """Returns when a lease was removed or has expired and is out of the way.

    Raises:
      UserError: Its holder renews it.
    """
    holder, before, end = _read(path), _stamp(path), time.monotonic() + EXPIRED
    while time.monotonic() < end:
        time.sleep(min(RENEWED, EXPIRED) / 4)
        if _stamp(path) is None:
            return
        if _stamp(path) != before:
            raise _in_use(directory, path)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != holder:  # another run was faster and has a lease of its own, which it gets back
        os.link(aside, path)
        aside.unlink()
        raise _in_use(directory, path)
    aside.unlink()


def _renew(path: Path, holder: dict[str, Any], ended: threading.Event) -> None:
    """Renews a lease until the run ends; a run that has lost it, after it slept for long, stops."""
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
    return UserError(f"{directory}: another run is writing there ({who}); wait for its end, or give another --out")
