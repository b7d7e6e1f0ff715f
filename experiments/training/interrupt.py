"""Ctrl-C and preemption between two steps instead of inside one, where donated buffers are neither here nor there."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from experiments.errors import Preempted
from lora_jax.io import raise_on_signal


class Interrupt:
    """Says whether the process has been asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def reached(self, step: int) -> bool:
        """Whether to stop after this step: where there are several processes, all agree on one."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None

    def error(self, step: int) -> BaseException:
        """What to raise when the state is saved."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Preempted(f"at step {step}: saved")


def terminable() -> AbstractContextManager[None]:
    """Makes SIGTERM inside the `with` block raise :class:`Preempted`, but for what :func:`deferred` has within."""
    return raise_on_signal(lambda: Preempted("outside of the steps: nothing to save"))


@contextmanager
def deferred() -> Iterator[Interrupt]:
    """Turns SIGINT and SIGTERM inside the `with` block into a request; a second SIGINT stops at once."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.signal = interrupt.signal or number
        if jax.process_count() > 1:  # JAX's service listens for this one, and tells the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
