"""The loop around a compiled train step: progress, evaluation, checkpoints, resuming."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np

import lora_jax as lora
from experiments.errors import UserError
from experiments.tasks.batching import Batch
from experiments.training.interrupt import deferred
from experiments.training.progress import Bar
from experiments.training.resume import Checkpoints
from experiments.training.stream import Stream

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


def train(
    step: Step[S],
    state: S,
    stream: Stream,
    epochs: int,
    *,
    score: float,
    evaluate: Callable[[S], float],
    shown: Callable[[float], str],
    checkpoints: Checkpoints,
    bar: Bar,
) -> tuple[S, History]:
    """Runs or resumes a training run to its end.

    Args:
      step: The library's compiled train step.
      state: What a run begins with.
      stream: The batches by step.
      epochs: Passes over the data.
      score: Of the state that a run begins with, on validation.
      evaluate: The score of a state; called after every epoch, and in the middle of a single one.
      shown: A score as it is printed.
      checkpoints: Where the run resumes from and leaves its state, on an interrupt as well.
      bar: Shows how far it is.

    Returns:
      The last state and what was measured, as if the run had never been interrupted.

    Raises:
      UserError: The loss or a gradient is not finite.
      KeyboardInterrupt: After a checkpoint was written.
    """
    total = epochs * stream.steps_per_epoch
    due = set(np.linspace(0, total, max(epochs, 2) + 1).round().astype(int).tolist())
    state, found = checkpoints.restore(state)
    history = History(**found) if found else History(evaluations=[(0, score)])
    if found:
        bar.say(f"  resumed at step {len(history.losses)} of {total}")
        bar.start_at(sum(map(stream.examples, range(len(history.losses)))))
    began = time.perf_counter() - history.seconds
    with deferred() as interrupt:
        for done in range(len(history.losses) + 1, total + 1):
            state, metrics = step(state, stream[done - 1])
            _check_finite(done, metrics)
            history.losses.append(float(metrics["loss"]))
            if done in due:
                history.evaluations.append((done, evaluate(state)))
            history.seconds = time.perf_counter() - began
            checkpoints.save(done, state, asdict(history), force=interrupt.asked)
            if interrupt.asked:
                raise KeyboardInterrupt
            note = f"step {done}/{total}  loss {np.mean(history.losses[-20:]):.3f}"
            bar.advance(stream.examples(done - 1), note)
            if done % stream.steps_per_epoch == 0:
                note += f", validation {shown(history.evaluations[-1][1])}"
                bar.say(f"  epoch {done // stream.steps_per_epoch}: {note}")
    return state, history


def _check_finite(step: int, metrics: dict[str, Any]) -> None:
    if not math.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"])):
        try:
            lora.training.check_finite(metrics)
        except FloatingPointError as error:
            raise UserError(f"training diverged at step {step}, try a smaller learning rate: {error}") from None
