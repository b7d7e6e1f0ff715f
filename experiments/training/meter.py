"""Measures the steps of a training run: losses, speed, memory, and traces of the profiler."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from experiments.errors import UserError
from experiments.training.processes import is_first
from experiments.training.record import Record
from experiments.training.run import History, TrainingRun

_SHORT = 0.2  # seconds of a step whose metrics are read after the next one is dispatched


class Meter:
    """Reads the metrics of steps.

    Those of short steps are read after the next step is dispatched, so that devices do not wait for the host. For long
    steps, and the first one, the wait does not matter, and they are read at once.
    """

    def __init__(self, run: TrainingRun, history: History, record: Record):
        self._run, self._history, self._record = run, history, record
        self._mark = self._start = time.perf_counter()
        self._before = history.seconds
        self._pending: list[tuple[int, dict[str, Any], int, int]] = []
        self._pace = math.inf  # seconds of the last step
        self._seconds, self._tokens, self._labels, self._steps = 0.0, 0, 0, 0  # since the last line of metrics

    def add(self, step: int, metrics: dict[str, Any], tokens: int, labels: int) -> None:
        """Adds a dispatched step on `tokens` tokens, without padding, with `labels` labels."""
        self._pending.append((step, metrics, tokens, labels))
        self.settle(pending=int(self._pace < _SHORT))

    def settle(self, pending: int = 0) -> None:
        """Reads the metrics of all but the last `pending` steps."""
        while len(self._pending) > pending:
            step, metrics, tokens, labels = self._pending.pop(0)
            check_finite(step, metrics)
            self._history.losses.append(float(metrics["loss"]))
            for name, value in means(metrics).items():
                self._history.means.setdefault(name, []).append(value)
            now = time.perf_counter()
            self._pace, self._mark = now - self._mark, now
            self._seconds, self._steps = self._seconds + self._pace, self._steps + 1
            self._tokens, self._labels = self._tokens + tokens, self._labels + labels
            if step % self._run.log_every == 0 or step == 1:
                self._log(step, metrics)
        self._history.seconds = self._before + time.perf_counter() - self._start

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics on the steps since the last line."""
        costs, speed, labels = self._run.costs, self._tokens / self._seconds, self._labels / self._seconds
        self._record.write(
            step,
            loss=float(np.mean(self._history.losses[-self._steps :])),
            **{name: float(np.mean(values[-self._steps :])) for name, values in self._history.means.items()},
            grad_norm=float(metrics["grad_norm"]),
            seconds=self._seconds / self._steps,
            tokens_per_second=speed,
            labels_per_second=labels,
            mfu=(costs.token_flops * speed + costs.label_flops * labels) / costs.peak if costs and costs.peak else None,
            **_memory(),
        )
        self._seconds, self._tokens, self._labels, self._steps = 0.0, 0, 0, 0

    def restart_clock(self) -> None:
        """Excludes the time since the last step from the time of steps."""
        self._mark = time.perf_counter()


def means(metrics: dict[str, Any]) -> dict[str, float]:
    """Returns the means of a step's other metrics: those in `means`, and those of the sums that a loss returns."""
    sums = metrics.get("aux", {})
    return {name: float(np.sum(value)) / float(metrics["weight"]) for name, value in sums.items()} | dict(
        metrics.get("means", {})
    )


@contextmanager
def profile_steps(run: TrainingRun, step: int, total: int) -> Iterator[Callable[[int, Meter], None]]:
    """Yields a function to call before each step after `step`, which traces the steps of `run.profile`."""
    first, last = max(run.profile.start, step + 1), min(run.profile.stop - 1, total)
    enabled, tracing = is_first() and first <= last, False

    def trace(step: int, meter: Meter) -> None:
        nonlocal tracing
        if enabled and step in (first, last + 1):
            meter.settle()
            if step == first:
                jax.profiler.start_trace(str(run.directory / "profile"))
            else:
                jax.profiler.stop_trace()
            tracing = step == first

    try:
        yield trace
    finally:
        if tracing:
            jax.profiler.stop_trace()


def _memory() -> dict[str, float | None]:
    """Returns the peak memory of the device, if it reports it, and of the process, in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device_bytes": stats.get("peak_bytes_in_use"), "host_bytes": process}


def check_finite(step: int, metrics: dict[str, Any]) -> None:
    """Raises a UserError with advice if the loss or the gradient norm of a step is not finite."""
    if not math.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"])):
        try:
            lora.check_finite(metrics)
        except FloatingPointError as error:
            advice = (
                "the weights or the data are the cause, not the learning rate (NaN in the checkpoint, token ids beyond "
                "the embedding, a dtype of too small a range)"
                if step == 1
                else "try a smaller learning rate"
            )
            raise UserError(f"training diverged at step {step}; {advice}: {error}") from None
