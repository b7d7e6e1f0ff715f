"""Trained methods of classification: what they adapt, their training and their results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import lora_jax as lora
from experiments.models import bert
from experiments.reports.results import Result, stored_bytes
from experiments.studies.head import Start
from experiments.studies.problem import accuracy, answers
from experiments.studies.task import CLASSIFICATION, Task
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.loop import plan_steps, train
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import History, TrainingRun
from experiments.training.stream import Stream


@dataclass(frozen=True)
class Method:
    """The trained weights and hyperparameters of a method.

    Attributes:
      name: The name in tables and directories.
      spec: Recipes by pattern of paths.
      lr: Peak learning rate.
      epochs: Passes over the training examples.
      batch_size: Examples per step.
      warmup: Fraction of the steps in which the learning rate rises.
      clip: Maximum global norm of the gradients.
      label_smoothing: Label smoothing: the probability that is spread evenly over the classes.
      rules: Formats of quantized weights by pattern of paths.
    """

    name: str
    spec: Mapping[str, Any]
    lr: float
    epochs: int
    batch_size: int
    warmup: float
    clip: float
    label_smoothing: float
    rules: Mapping[str, Any] = field(default_factory=dict)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer of a run of `steps` steps."""
        return adam(self.lr, steps, warmup=self.warmup, clip=self.clip)


def run(start: Start, method: Method, seed: int, run: TrainingRun, console: Console) -> Result:
    """Trains a method, resumes its run, or reads the result of a finished run.

    Args:
      start: The starting point.
      method: The method.
      seed: Random seed of the initial factors and the order of the examples.
      run: The training run. `adapter/` and `result.json` are written to its directory.
      console: The output of the progress bar.
    """
    directory, mesh = run.directory, run.mesh
    stored = directory / "result.json"
    if processes.broadcast(stored.exists()):
        return Result.load(stored)
    problem, splits = start.problem, start.problem.splits
    base = meshes.put_weights(mesh, bert.AXES, start.base)
    base = problem.quantize(base, method.rules) if method.rules else base
    adapted = jax.jit(lora.adapt(problem.apply), out_shardings=meshes.replicated(mesh))
    plain = jax.jit(problem.apply, out_shardings=meshes.replicated(mesh))

    def logits(split: str, function: Callable, *params: Any) -> np.ndarray:
        def answer(*inputs: np.ndarray) -> jax.Array:
            return function(*params, *(meshes.shard_examples(mesh, array) for array in inputs))[0]

        return answers(answer, splits[split], problem.lengths)

    def evaluate(state: lora.TrainState) -> float:
        return accuracy(logits("validation", adapted, base, state.delta), splits["validation"])

    state, history = fit(start, base, method, seed, run, console, evaluate=evaluate)
    unmerged = logits("test", adapted, base, state.delta)
    merged = logits("test", plain, lora.merge(base, state.delta))
    delta = meshes.gather(state.delta)
    with processes.first_before_others():
        if processes.is_first():
            lora.save(directory / "adapter", delta, base=problem.base)  # the delta replaces the head
            result = Result(
                method=method.name,
                seed=seed,
                trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])),
                adam_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
                adapter_bytes=stored_bytes(directory / "adapter"),
                seconds=history.seconds,
                validation_accuracy=history.evaluations[-1][1],
                lr=method.lr,
                test_accuracy=accuracy(unmerged, splits["test"]),
                merged_difference=float(np.abs(merged - unmerged).max()),
                merged_agreement=float(np.mean(merged.argmax(-1) == unmerged.argmax(-1))),
                losses=history.losses,
                evaluations=history.evaluations,
            )
            result.save(stored)
            outputs.clear(directory, "checkpoints")
    return Result.load(stored)


def fit(
    start: Start,
    base: Any,
    method: Method,
    seed: int,
    run: TrainingRun,
    console: Console,
    *,
    evaluate: Callable[[lora.TrainState], float],
) -> tuple[lora.TrainState, History]:
    """Trains a new delta of a method, or resumes its run.

    Args:
      start: The starting point.
      base: Its base on the mesh of the run, which may be quantized.
      method: The method.
      seed: Random seed of the initial factors and the order of the examples.
      run: The training run.
      console: The output of the progress bar.
      evaluate: Computes the validation accuracy of a state.

    Returns:
      The final state and the measurements.
    """
    problem, split = start.problem, start.problem.splits["train"]
    init_key, train_key = jax.random.split(jax.random.key(seed))
    delta = problem.delta(init_key, base, method.spec, run.mesh)
    stream = Stream(split.sequences, split.labels, problem.lengths, method.batch_size, seed)
    total, due = plan_steps(method.epochs, stream.steps_per_epoch)
    tx = method.optimizer(total)
    with bar(console, _title(method, seed), method.epochs * len(split)) as progress:
        return train(
            run,
            lora.train_step(loss_function(problem.apply, method.label_smoothing), tx),
            lora.TrainState.create(base, delta, tx, train_key),
            stream,
            total,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=evaluate,
            format_score="{:.1%}".format,
            bar=progress,
        )


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


def _title(method: Method, seed: int) -> str:
    return f"{method.name} (seed {seed})" if seed else method.name
