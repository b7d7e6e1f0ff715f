"""Several processes that run one command together."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.errors import UserError

SILENCE = 30
"""Seconds after which a process that says nothing counts as ended, and the others end too."""

_DELAY = 10  # seconds until what was written on a network's disk is seen everywhere
_LOST = r"Gloo|NCCL|coordination service|Connection (closed|reset)|heartbeat|UNAVAILABLE"


class LostProcess(Exception):
    """Another process of the run has ended. Exit status 76."""


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """The first process runs the `with` block before the others do: what it writes, they find."""
    if not is_first():
        wait(name)
    yield
    if is_first():
        wait(name)


def check_shared(directory: Path) -> None:
    """Raises a UserError, in every process, unless all of them see what the first one writes to a directory."""
    if jax.process_count() == 1:
        return
    mark = int(multihost_utils.broadcast_one_to_all(np.int32(os.getpid())))
    path = directory / f".seen-by-all-{mark}"
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
        path.touch()
    wait("mark written")
    seen, end = path.exists(), time.monotonic() + _DELAY
    while not seen and time.monotonic() < end:
        time.sleep(0.2)
        seen = path.exists()
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(seen)))
    if is_first():
        path.unlink()
    if blind.size:
        raise UserError(
            f"out {directory}: process {blind[0]} does not see what process 0 writes there; it has to be a directory "
            "that all have in common"
        )


def console() -> Console:
    """Where the first process prints; that of another one is silent."""
    return Console(quiet=not is_first())


@contextmanager
def joined() -> Iterator[None]:
    """Makes this process one of those that the environment describes, for the `with` block.

    Raises:
      UserError: The environment does not say who is who, or the others cannot be reached.
      LostProcess: Another process ended inside the block.
    """
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--distributed: {reason} On a TPU pod and under Slurm processes find each other; elsewhere set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or not re.search(_LOST, str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostProcess(f"another process has ended ({reason})") from error
    jax.distributed.shutdown()


def end(status: int) -> None:
    """Ends this process without waiting for the others, which may be in a step: they notice that it is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, not {text!r}")
    return int(text)
