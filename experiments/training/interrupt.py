"""Defers Ctrl-C and preemption to the end of a step, since buffers are donated within a step."""

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
    """The request to stop that the process has received, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def requested(self, step: int) -> bool:
        """Whether to stop after this step, which is the same for all processes."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None

    def error(self, step: int) -> BaseException:
        """Returns the exception to raise after the state is saved."""
        return KeyboardInterrupt() if self.signal == signal.SIGINT else Preempted(f"at step {step}: saved")


def terminable() -> AbstractContextManager[None]:
    """A context in which SIGTERM raises :class:`Preempted`, except within :func:`defer_signals`."""
    return raise_on_signal(lambda: Preempted("outside of the steps: nothing to save"))


@contextmanager
def defer_signals() -> Iterator[Interrupt]:
    """A context that converts SIGINT and SIGTERM to a request to stop; a second SIGINT stops immediately."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupt.signal = interrupt.signal or number
        if jax.process_count() > 1:  # JAX's preemption service handles SIGTERM and notifies the other processes
            os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
