"""The loop around a compiled train step: progress, evaluation, checkpoints, resuming."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

import lora_jax as lora
from experiments.errors import UserError
from experiments.input.pipeline import Batches, iterate
from experiments.tasks.batching import Batch
from experiments.training import mesh as meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.interrupt import deferred
from experiments.training.processes import agreed, is_first
from experiments.training.progress import Bar
from experiments.training.record import Record

S = TypeVar("S")
Step = Callable[[S, Batch], tuple[S, dict[str, Any]]]


@dataclass
class History:
    """What a run has measured so far.

    Attributes:
      losses: Of every step.
      evaluations: (step, score on validation) pairs; what a score is, is the study's to say.
      seconds: Spent in training and evaluation, compilation included.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.evaluations = [(step, score) for step, score in self.evaluations]  # JSON makes lists of pairs


@dataclass(frozen=True)
class Limits:
    """What ends a run before its last step.

    Attributes:
      minutes: Of training and evaluation, those of earlier processes of the run included; None has no limit.
      patience: Evaluations in a row without a better score; None has no limit.
      best: Which scores are better: "max" or "min".
    """

    minutes: float | None = None
    patience: int | None = None
    best: Literal["max", "min"] = "max"

    def reached(self, history: History) -> str | None:
        """Which limit a run has reached, as a phrase; None where it goes on.

        Example:
          >>> Limits(patience=2, best="min").reached(History(evaluations=[(0, 3.0), (5, 2.0), (10, 2.5), (15, 2.1)]))
          'no better validation score in 2 evaluations'
        """
        if self.minutes is not None and history.seconds >= 60 * self.minutes:
            return f"{self.minutes:g} minutes are over"
        if self.patience is not None and history.evaluations:
            scores = [score for _, score in history.evaluations]
            better = (max if self.best == "max" else min)(scores)
            if len(scores) - 1 - scores.index(better) >= self.patience:
                return f"no better validation score in {self.patience} evaluations"
        return None


@dataclass(frozen=True)
class Costs:
    """What a token costs, for the share of the devices' arithmetic that a run makes use of.

    Attributes:
      flops: Of the model, forward and backward, for a token.
      peak: FLOP/s of all devices of the run; None where it is not known.
    """

    flops: float
    peak: float | None


@dataclass(frozen=True)
class Run:
    """Where a run takes place and what it leaves behind.

    Attributes:
      directory: Of this run alone: checkpoints, metrics.
      mesh: Batches are divided over it.
      config: The resolved settings, as they are written down.
      checkpoint_every: Steps between checkpoints.
      best: Which scores are better: "max" or "min".
      settings: See :class:`Checkpoints`.
      profile: Steps whose trace is written.
      costs: None leaves the share of the arithmetic out.
      limits: What ends it before its last step.
      log_every: Steps between lines of metrics.
    """

    directory: Path
    mesh: Mesh
    config: Mapping[str, Any]
    checkpoint_every: int
    best: Literal["max", "min"] = "max"
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: range = range(0)
    costs: Costs | None = None
    limits: Limits = field(default_factory=Limits)
    log_every: int = 1

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def train(
    run: Run,
    step: Step[S],
    state: S,
    batches: Batches,
    total: int,
    *,
    due: set[int],
    score: float,
    evaluate: Callable[[S], float],
    shown: Callable[[float], str],
    bar: Bar,
) -> tuple[S, History]:
    """Runs or resumes a training run to its end.

    Args:
      run: Where.
      step: The library's compiled train step.
      state: What a run begins with, on the run's mesh.
      batches: The batches by step.
      total: Steps in all.
      due: Steps after which the state is evaluated, and saved.
      score: Of the state that a run begins with, on validation.
      evaluate: The score of a state.
      shown: A score as it is printed.
      bar: Shows how far it is.

    Returns:
      The last state and what was measured, as if the run had never been interrupted.

    Raises:
      UserError: The loss or a gradient is not finite; a checkpoint cannot be read or written, or is of a later step
        than the last one.
      KeyboardInterrupt: After a checkpoint was written.
      Preempted: Likewise, by SIGTERM.
    """
    with Checkpoints(run.checkpoints, best=run.best, settings=run.settings, say=bar.say) as checkpoints:
        state, found = checkpoints.restore(state)
        history = History(**found["history"]) if found else History(evaluations=[(0, score)] if due else [])
        start = len(history.losses)
        if start > total:
            raise UserError(
                f"{run.directory}: holds a run that was interrupted at step {start:,}, beyond the {total:,} steps of "
                "this one; ask for as many steps or more, or --fresh starts over"
            )
        if found:
            bar.say(f"  resumed at step {start} of {total}")
            bar.start_at(sum(map(batches.examples, range(start))))
        rows = meshes.process_rows(run.mesh, batches.batch_size)
        with (
            closing(iterate(batches, total, rows=rows, start=start)) as iterator,
            Record(run.directory, run.config, start) as record,
            _profiled(run, start, total) as profile,
            deferred() as interrupt,
        ):
            if found:
                iterator.set_state(found["input"])
            meter = _Meter(run, history, record)
            for done in range(start + 1, total + 1):
                profile(done, meter)
                batch = next(iterator)
                state, metrics = step(state, meshes.put_batch(run.mesh, batch, batches.batch_size))
                meter.add(done, metrics, batch["tokens"].size * batches.batch_size // (rows.stop - rows.start))
                stopping = interrupt.reached(done)
                # Clocks differ: where there are several processes, all follow the first one's.
                late = run.limits.minutes is not None and bool(agreed(run.limits.reached(history) is not None))
                evaluating = bool(due) and (done in due or late)
                if evaluating:
                    meter.settle()
                    history.evaluations.append((done, evaluate(state)))
                    record.write(done, validation=history.evaluations[-1][1])
                    meter.settle()
                ending = late or (evaluating and run.limits.reached(history) is not None)
                if evaluating or stopping or ending or done % run.checkpoint_every == 0 or done == total:
                    meter.settle()
                    content = {"history": asdict(history), "input": iterator.get_state()}
                    last = history.evaluations[-1][1] if evaluating else None
                    checkpoints.save(done, state, content, score=last, wait=stopping)
                    meter.go_on()
                if stopping:
                    raise interrupt.error(done)
                note = f"step {done}/{total}  loss {np.mean(history.losses[-20:] or [math.nan]):.3f}"
                bar.advance(batches.examples(done - 1), note)
                if done % batches.steps_per_epoch == 0 and done in due:
                    note += f", validation {shown(history.evaluations[-1][1])}"
                    bar.say(f"  epoch {done // batches.steps_per_epoch}: {note}")
                if ending and done < total:
                    bar.say(f"  ended at step {done} of {total}: {run.limits.reached(history)}")
                    break
            meter.settle()
    return state, history


def passes(
    epochs: int, steps_per_epoch: int, limit: int | None = None, every: int | None = None
) -> tuple[int, set[int]]:
    """Steps in all, and those to evaluate after.

    Args:
      epochs: Passes over the data.
      steps_per_epoch: Of a pass.
      limit: The most steps; None has no limit.
      every: Steps between evaluations. None evaluates after every pass, and in the middle of a single one. The last
        step is evaluated in any case.

    Example:
      >>> total, due = passes(2, 10, 15, every=4)
      >>> total, sorted(due)
      (15, [4, 8, 12, 15])
    """
    total = min(epochs * steps_per_epoch, limit or epochs * steps_per_epoch)
    if every is not None:
        return total, {*range(every, total, every), total}
    due = {*range(steps_per_epoch, total, steps_per_epoch), total}
    return total, due if len(due) > 1 else {total, round(total / 2)} - {0}


class _Meter:
    """Reads a step's metrics when the next step is under way, so that devices do not wait for the host."""

    def __init__(self, run: Run, history: History, record: Record):
        self._run, self._history, self._record = run, history, record
        self._mark = self._began = time.perf_counter()
        self._before = history.seconds
        self._waiting: list[tuple[int, dict[str, Any], int]] = []
        self._seconds, self._tokens, self._steps = 0.0, 0, 0  # since the last line

    def add(self, step: int, metrics: dict[str, Any], tokens: int) -> None:
        """Takes note of a step that has been asked for, on so many tokens, and reads the one before."""
        self._waiting.append((step, metrics, tokens))
        self.settle(behind=1)

    def settle(self, behind: int = 0) -> None:
        """Reads what is waiting, but for the last `behind` steps."""
        while len(self._waiting) > behind:
            step, metrics, tokens = self._waiting.pop(0)
            _check_finite(step, metrics)
            self._history.losses.append(float(metrics["loss"]))
            now = time.perf_counter()
            self._seconds, self._mark = self._seconds + now - self._mark, now
            self._tokens, self._steps = self._tokens + tokens, self._steps + 1
            if step % self._run.log_every == 0 or step == 1:
                self._log(step, metrics)
        self._history.seconds = self._before + time.perf_counter() - self._began

    def _log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes a line on the steps since the one before."""
        costs, speed = self._run.costs, self._tokens / self._seconds
        self._record.write(
            step,
            loss=float(np.mean(self._history.losses[-self._steps :])),
            grad_norm=float(metrics["grad_norm"]),
            seconds=self._seconds / self._steps,
            tokens_per_second=speed,
            mfu=costs.flops * speed / costs.peak if costs and costs.peak else None,
            **_memory(),
        )
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def go_on(self) -> None:
        """The time from here on is that of steps, not of what was done between them."""
        self._mark = time.perf_counter()


@contextmanager
def _profiled(run: Run, done: int, total: int) -> Iterator[Callable[[int, _Meter], None]]:
    """A function to call before each step, which writes a trace of those that are asked for and yet to come."""
    first, last = max(run.profile.start, done + 1), min(run.profile.stop - 1, total)
    wanted, tracing = is_first() and first <= last, False

    def before(step: int, meter: _Meter) -> None:
        nonlocal tracing
        if wanted and step in (first, last + 1):
            meter.settle()
            if step == first:
                jax.profiler.start_trace(str(run.directory / "profile"))
            else:
                jax.profiler.stop_trace()
            tracing = step == first

    try:
        yield before
    finally:
        if tracing:
            jax.profiler.stop_trace()


def _memory() -> dict[str, float | None]:
    """The most bytes that were in use: on the device where it counts them, and of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"device_bytes": stats.get("peak_bytes_in_use"), "host_bytes": process}


def _check_finite(step: int, metrics: dict[str, Any]) -> None:
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
