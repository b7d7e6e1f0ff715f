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

from experiments.errors import Preempted, UserError

SILENCE = 30
"""Seconds after which a process that says nothing counts as ended, and the others end too."""

PATIENCE = 300
"""Seconds that processes wait for each other at the start."""

_DELAY = 10  # seconds until what was written on a network's disk is seen everywhere
_LOST = r"Gloo|coordination service|heartbeat|Connection (closed|reset) by peer"


class LostProcess(Exception):
    """Another process of the run has ended. Exit status 76."""


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(mine: int) -> int:
    """The number that the first process has, in every process: what all do next must not differ."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(mine))) if jax.process_count() > 1 else mine


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs the `with` block before the others do: what it writes, they find.

    Raises:
      UserError: In the others, where the block failed in the first.
    """
    if not is_first() and agreed(0):
        raise UserError("process 0 has failed, and says why")
    try:
        yield
    except BaseException:
        if is_first():
            agreed(1)
        raise
    if is_first():
        agreed(0)


def check_shared(directory: Path) -> None:
    """Raises a UserError, in every process, unless all of them see what the first one writes to a directory."""
    if directory.parts and ":" in directory.parts[0]:
        raise UserError(f"out {directory}: an address; give a directory, where the bucket is mounted for one")
    if jax.process_count() == 1:
        return
    path = directory / f".seen-by-all-{agreed(os.getpid())}"
    with first_before_others():
        if is_first():
            directory.mkdir(parents=True, exist_ok=True)
            path.touch()
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


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process without a word


def console() -> Console:
    """Where the first process prints; that of another one is silent. A closed output raises BrokenPipeError."""
    return _Output(quiet=not is_first())


@contextmanager
def joined() -> Iterator[None]:
    """Makes this process one of those that the environment describes, for the `with` block.

    Raises:
      UserError: The environment does not say who is who, or the others cannot be reached.
      LostProcess: Another process ended inside the block.
    """
    count, number = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=count,
            process_id=number,
            initialization_timeout=PATIENCE,
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
    except Preempted:  # all have agreed on it: none leaves before the others are ready to
        jax.distributed.shutdown()
        raise
    except (ValueError, RuntimeError) as error:
        if not is_lost(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostProcess(f"another process has ended ({reason})") from error
    jax.distributed.shutdown()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process has ended."""
    return not isinstance(error, UserError) and bool(re.search(_LOST, str(error)))


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
