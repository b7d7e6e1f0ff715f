"""Runs with several processes."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from experiments.errors import Preempted, UserError

SILENCE = 30
"""Seconds without a heartbeat after which a process counts as ended, and the others end too."""

PATIENCE = 300
"""Seconds that processes wait for each other at startup."""

_DELAY = 10  # the maximum delay, in seconds, until all processes see a file on a network file system
_LOST = r"Gloo|coordination service|heartbeat|Connection (closed|reset) by peer"


class LostProcess(Exception):
    """Another process of the run has ended; the exit status is 76."""


def is_first() -> bool:
    """Whether this process is the first one, which writes files."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes have called this function."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast(number: int) -> int:
    """Returns the first process's number in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if jax.process_count() > 1 else number


@contextmanager
def first_before_others() -> Iterator[None]:
    """A context in which the first process runs the block before the others, which then see the files it writes.

    Raises:
      UserError: In the other processes, if the block failed in the first.
    """
    if not is_first() and broadcast(0):
        raise UserError("process 0 has failed; see its output")
    try:
        yield
    except BaseException:
        if is_first():
            broadcast(1)
        raise
    if is_first():
        broadcast(0)


def exists(path: Path) -> bool:
    """Whether the first process sees a file; the same in every process."""
    return bool(broadcast(path.exists()))


def write(write_files: Callable[[], object]) -> None:
    """Calls a function in the first process; the others wait for it, and then see the files that it writes."""
    with first_before_others():
        if is_first():
            write_files()


def check_shared(directory: Path) -> None:
    """Raises a UserError in every process unless all of them see the files that the first one writes to a directory."""
    if directory.parts and ":" in directory.parts[0]:
        raise UserError(f"out {directory}: expected a directory (such as a mounted bucket), got an address")
    if jax.process_count() == 1:
        return
    path = directory / f".seen-by-all-{broadcast(os.getpid())}"
    with first_before_others():
        if is_first():
            directory.mkdir(parents=True, exist_ok=True)
            path.touch()
    visible, end = path.exists(), time.monotonic() + _DELAY
    while not visible and time.monotonic() < end:
        time.sleep(0.2)
        visible = path.exists()
    blind = np.flatnonzero(~multihost_utils.process_allgather(np.array(visible)))
    if is_first():
        path.unlink()
    if blind.size:
        raise UserError(
            f"out {directory}: process {blind[0]} does not see the files of process 0; expected a directory that all "
            "processes share"
        )


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process silently


def console() -> Console:
    """Returns a console that prints text as it is, brackets included, in the first process only.

    A closed output raises BrokenPipeError.
    """
    return _Output(markup=False, quiet=not is_first())


@contextmanager
def distributed() -> Iterator[None]:
    """A context in which this process is one of those that the environment describes.

    Raises:
      UserError: The environment does not describe the processes, or the others cannot be reached.
      LostProcess: Another process ended within the context.
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
            f"--distributed: {reason} TPU pods and Slurm are detected; elsewhere set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    try:
        yield
    except Preempted:  # all processes stop at the same step and leave together
        jax.distributed.shutdown()
        raise
    except (ValueError, RuntimeError) as error:
        if not is_lost(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostProcess(f"another process has ended ({reason})") from error
    jax.distributed.shutdown()


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process has ended."""
    return not isinstance(error, UserError) and bool(re.search(_LOST, str(error)))


def end(status: int) -> None:
    """Ends this process without waiting for the others, which may be within a step and notice that it has ended."""
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
