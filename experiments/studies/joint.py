"""Trains adapters of several specs and learning rates at once, on the same batches and one copy of the base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import lora_jax as lora
from experiments.errors import UserError
from experiments.studies.head import Start
from experiments.studies.methods import loss_function
from experiments.studies.problem import answers
from experiments.studies.task import CLASSIFICATION, Task
from experiments.training.loop import plan_steps, train
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import History, TrainingRun
from experiments.training.stream import Stream

_READ = 16  # batches that initializers read


class Settings(Protocol):
    """The settings that all adapters share; see the configs of the studies that train jointly."""

    @property
    def seed(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def warmup(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def clip(self) -> float: ...


class Diverged(UserError):
    """The training of all adapters diverged."""


@dataclass(frozen=True)
class Joint:
    """The result of joint training.

    Attributes:
      deltas: The trained adapters.
      logits: `float[examples, adapters, outputs]` on the validation examples; NaN if training diverged.
      history: The measurements: the mean loss over adapters of every step, and the best validation score.
      task: The task.
    """

    deltas: list[dict[str, Any]]
    logits: np.ndarray
    history: History
    task: Task = CLASSIFICATION

    def scores(self, labels: np.ndarray) -> np.ndarray:
        """Returns the validation score of each adapter; NaN if training diverged."""
        return _scores(self.task, self.logits, labels)


def train_jointly(
    start: Start,
    specs: Sequence[Mapping[str, Any]],
    rates: Sequence[float],
    settings: Settings,
    run: TrainingRun,
    console: Console,
    *,
    at_once: int | None = None,
    once: bool = False,
    snapshot: Callable[[int, list[dict[str, Any]]], None] | None = None,
    wrap: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] | None = None,
    penalty: float = 0.0,
    weight_decay: float = 0.0,
) -> Joint:
    """Trains an adapter for each spec and learning rate, or resumes their run.

    Args:
      start: The starting point.
      specs: The spec of each adapter. Adapters of equal specs start from the same factors.
      rates: The peak learning rate of each adapter.
      settings: The settings that all adapters share.
      run: The training run.
      console: The output of the progress bar.
      at_once: As for :func:`lora_jax.train_many`.
      once: Whether to evaluate at the end only.
      snapshot: Called at every evaluation with the step and the adapters.
      wrap: Wraps the optimizer of each adapter: `wrap(tx, steps)`.
      penalty: The weight of AdaLoRA's orthogonality penalty in the loss.
      weight_decay: As for :func:`experiments.training.optimizer.adam`.

    Raises:
      Diverged: The training of all adapters diverged.
    """
    problem, splits = start.problem, start.problem.splits
    stream = Stream(
        splits["train"].sequences, splits["train"].labels, problem.lengths, settings.batch_size, settings.seed
    )
    deltas = _deltas(start, specs, settings.seed, stream)
    steps, due = plan_steps(settings.epochs, stream.steps_per_epoch)
    due = {steps} if once else due

    def tx(lr):
        inner = adam(lr, steps, warmup=settings.warmup, clip=settings.clip, weight_decay=weight_decay)
        return inner if wrap is None else wrap(inner, steps)

    keys = jax.random.split(jax.random.key(settings.seed), len(deltas))
    states = lora.TrainStates.create(start.base, deltas, tx, keys, {"lr": list(rates)})
    loss = loss_function(problem.apply, settings.label_smoothing, penalty, problem.task)
    step = lora.train_many(loss, tx, batch_axes=None, at_once=at_once)
    logits, labels = _logits_function(start), splits["validation"].labels
    logits_at: dict[int, np.ndarray] = {}  # of the last evaluation

    def evaluate(states: lora.TrainStates) -> float:
        logits_at.clear()
        logits_at[_last_step(states)] = logits(states)
        if snapshot is not None:
            snapshot(_last_step(states), lora.unstack(states.delta, deltas))
        return float(np.nanmax(_scores(problem.task, logits_at[_last_step(states)], labels)))

    with bar(console, f"{len(deltas)} adapters", settings.epochs * len(splits["train"])) as progress:
        states, history = train(
            run,
            average_members(step),
            states,
            stream,
            steps,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score="{:.1%} at best".format,
            bar=progress,
        )
    if _last_step(states) not in logits_at:  # resumed after the last step
        evaluate(states)
    return Joint(lora.unstack(states.delta, deltas), logits_at[_last_step(states)], history, problem.task)


def _last_step(states: lora.TrainStates) -> int:
    return int(states.step.max())


def _deltas(start: Start, specs: Sequence[Mapping[str, Any]], seed: int, stream: Stream) -> list[dict[str, Any]]:
    key, by_spec = jax.random.key(seed), {}
    for spec in specs:
        if repr(spec) not in by_spec:
            if any(recipe.reads for recipe in spec.values()):
                batches = [(batch["tokens"], batch["mask"]) for batch in map(stream.__getitem__, range(_READ))]
                by_spec[repr(spec)] = start.problem.prepare(key, start.base, spec, batches)
            else:
                by_spec[repr(spec)] = start.problem.delta(key, start.base, spec)
    return [by_spec[repr(spec)] for spec in specs]


def average_members(step: Callable) -> Callable:
    """Wraps a step of :func:`lora_jax.train_many` for the training loop, which reads one loss.

    Its metrics become means over the members; members whose loss or gradient is not finite are deactivated.
    """

    def wrapped(states: lora.TrainStates, batch: Any) -> tuple[lora.TrainStates, dict[str, Any]]:
        states, metrics = step(states, batch)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]) & np.asarray(states.active)
        if not finite.any():
            raise Diverged("all adapters diverged; try smaller learning rates")
        means = {name: np.mean(np.asarray(metrics[name])[finite]) for name in ("loss", "grad_norm")}
        return replace(states, active=jnp.asarray(finite)), means

    return wrapped


def _logits_function(start: Start) -> Callable[[lora.TrainStates], np.ndarray]:
    """Returns a function from states to the validation logits of each adapter; NaN if it diverged."""
    problem = start.problem
    adapted = jax.jit(jax.vmap(lora.adapt(problem.apply), in_axes=(None, 0, None, None), out_axes=1))

    def logits(states: lora.TrainStates) -> np.ndarray:
        values = answers(
            lambda *inputs: adapted(states.base, states.delta, *inputs)[0],
            problem.splits["validation"],
            problem.lengths,
        )
        return np.where(np.asarray(states.active)[:, None], values, np.nan)

    return logits


def _scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    members = np.moveaxis(logits, 1, 0)
    return np.array([task.score(one, labels) if np.isfinite(one).all() else np.nan for one in members])
