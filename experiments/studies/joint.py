"""Trains adapters of several specs and learning rates at once, on the same batches and one copy of the base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

import lora_jax as lora
from experiments.errors import UserError
from experiments.studies.head import Start
from experiments.studies.problem import Problem, answers
from experiments.studies.task import CLASSIFICATION, Task
from experiments.training import mesh as meshes
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
    deltas = _deltas(start, specs, settings.seed, stream, run.mesh)
    steps, due = plan_steps(settings.epochs, stream.steps_per_epoch)
    due = {steps} if once else due

    def tx(lr):
        inner = adam(lr, steps, warmup=settings.warmup, clip=settings.clip, weight_decay=weight_decay)
        return inner if wrap is None else wrap(inner, steps)

    keys = jax.random.split(jax.random.key(settings.seed), len(deltas))
    states = lora.TrainStates.create(start.base, deltas, tx, keys, {"lr": list(rates)})
    fixed = {name: getattr(states, name) for name in ("hyper", "active", "present")}  # a step does not put them there
    states = states.replace(**meshes.replicate(run.mesh, fixed))
    loss = loss_function(problem.apply, settings.label_smoothing, penalty, problem.task)
    step = lora.train_many(loss, tx, batch_axes=None, at_once=at_once)
    logits, labels = _logits_function(problem, deltas, run.mesh), splits["validation"].labels
    logits_at: dict[int, np.ndarray] = {}  # of the last evaluation

    def evaluate(states: lora.TrainStates) -> float:
        logits_at.clear()
        logits_at[_last_step(states)] = logits(states)
        if snapshot is not None:
            snapshot(_last_step(states), lora.unstack(states.delta, deltas))
        return float(np.nanmax(_scores(problem.task, logits_at[_last_step(states)], labels)))

    with bar(console, "training", settings.epochs * len(splits["train"])) as progress:
        states, history = train(
            run,
            average_members(step, run.mesh),
            states,
            stream,
            steps,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score=("{:.1%} at best" if len(deltas) > 1 else "{:.1%}").format,
            bar=progress,
        )
    if _last_step(states) not in logits_at:  # resumed after the last step
        evaluate(states)
    return Joint(lora.unstack(states.delta, deltas), logits_at[_last_step(states)], history, problem.task)


def _last_step(states: lora.TrainStates) -> int:
    return int(states.step.max())


def _deltas(
    start: Start, specs: Sequence[Mapping[str, Any]], seed: int, stream: Stream, mesh: Mesh
) -> list[dict[str, Any]]:
    key, by_spec = jax.random.key(seed), {}
    for spec in specs:
        if repr(spec) not in by_spec:
            if any(recipe.reads for recipe in spec.values()):
                batches = [(batch["tokens"], batch["mask"]) for batch in map(stream.__getitem__, range(_READ))]
                by_spec[repr(spec)] = start.problem.prepare(key, start.base, spec, batches)
            else:
                by_spec[repr(spec)] = start.problem.delta(key, start.base, spec, mesh)
    return [by_spec[repr(spec)] for spec in specs]


def average_members(step: Callable, mesh: Mesh) -> Callable:
    """Wraps a step of :func:`lora_jax.train_many` for the training loop, which reads one loss.

    Its metrics become means over the members; members whose loss or gradient is not finite are deactivated.

    Args:
      step: The step.
      mesh: The mesh of its states.
    """

    def wrapped(states: lora.TrainStates, batch: Any) -> tuple[lora.TrainStates, dict[str, Any]]:
        states, metrics = step(states, batch)
        active = np.asarray(states.active)
        finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"]) & active
        if not finite.any():
            raise Diverged("all adapters diverged; try smaller learning rates")
        means = {name: np.mean(np.asarray(metrics[name])[finite]) for name in ("loss", "grad_norm")}
        if (finite != active).any():
            states = states.replace(active=meshes.replicate(mesh, jnp.asarray(finite)))
        return states, means

    return wrapped


def loss_function(
    apply: Callable, label_smoothing: float, penalty: float = 0.0, task: Task = CLASSIFICATION
) -> Callable:
    """Returns a loss function for `lora.train_step`: the sum of the losses and the number of examples.

    Args:
      apply: The model.
      label_smoothing: The probability that is spread evenly over the classes.
      penalty: The weight of AdaLoRA's orthogonality penalty.
      task: The task, whose loss it is.
    """
    adapted = lora.adapt(apply)

    def loss(base, delta, batch, key):
        outputs, _ = adapted(base, delta, batch["tokens"], batch["mask"])
        losses = task.losses(outputs, batch["labels"], label_smoothing)
        total, count = jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])
        return total + (count * penalty * lora.optim.orthogonality(delta) if penalty else 0.0), count

    return loss


def _logits_function(
    problem: Problem, deltas: Sequence[dict[str, Any]], mesh: Mesh
) -> Callable[[lora.TrainStates], np.ndarray]:
    """Returns a function from states to the validation logits of each adapter; NaN if it diverged."""
    if len(deltas) == 1:  # by the function that also computes the outputs of stored adapters, which is compiled once

        def logits_of_one(states: lora.TrainStates) -> np.ndarray:
            (delta,) = lora.unstack(states.delta, deltas)
            return problem.outputs(states.base, delta, "validation", mesh)[:, None]

        return logits_of_one
    adapted = jax.jit(
        jax.vmap(lora.adapt(problem.apply), in_axes=(None, 0, None, None), out_axes=1),
        out_shardings=meshes.replicated(mesh),
    )

    def logits(states: lora.TrainStates) -> np.ndarray:
        values = answers(
            lambda *inputs: adapted(
                states.base, states.delta, *(meshes.shard_examples(mesh, array) for array in inputs)
            )[0],
            problem.splits["validation"],
            problem.lengths,
        )
        return np.where(np.asarray(states.active)[:, None], values, np.nan)

    return logits


def _scores(task: Task, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    members = np.moveaxis(logits, 1, 0)
    return np.array([task.score(one, labels) if np.isfinite(one).all() else np.nan for one in members])
