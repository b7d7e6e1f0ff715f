"""One trained method: what it adapts, its training run, its result."""

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
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.loop import plan_steps, train
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import TrainingRun
from experiments.training.stream import Stream


@dataclass(frozen=True)
class Method:
    """What is trained and how.

    Attributes:
      name: In the table and in the names of directories.
      spec: Patterns of paths and the recipe of each.
      lr: Peak learning rate.
      epochs: Passes over the training examples.
      batch_size: Examples a step.
      warmup: Share of the steps in which the learning rate rises.
      clip: Largest global norm of the gradients.
      label_smoothing: Share of the target that is spread over all classes.
      rules: Patterns of paths and the format of each, where the base is quantized.
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
        """See :func:`experiments.training.optimizer.adam`."""
        return adam(self.lr, steps, warmup=self.warmup, clip=self.clip)


def run(start: Start, method: Method, seed: int, run: TrainingRun, console: Console) -> Result:
    """Trains a method, or goes on with it, or reads its result where it is finished.

    Args:
      start: The base with the head that training starts from.
      method: What to train.
      seed: Of the initial factors and the order of the examples.
      run: Where; its directory will hold `adapter/` and `result.json`.
      console: Where the bar is drawn.
    """
    directory, mesh = run.directory, run.mesh
    stored = directory / "result.json"
    if processes.broadcast(stored.exists()):
        return Result.load(stored)
    problem, splits = start.problem, start.problem.splits
    base = meshes.put_weights(mesh, bert.AXES, start.base)
    base = problem.quantized(base, method.rules) if method.rules else base
    init_key, train_key = jax.random.split(jax.random.key(seed))
    delta = problem.delta(init_key, base, method.spec, mesh)
    stream = Stream(splits["train"].sequences, splits["train"].labels, problem.lengths, method.batch_size, seed)
    total, due = plan_steps(method.epochs, stream.steps_per_epoch)
    tx = method.optimizer(total)
    state = lora.TrainState.create(base, delta, tx, train_key)
    costs = {
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])),
        "adam_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
    }
    adapted = jax.jit(lora.adapt(problem.apply), out_shardings=meshes.replicated(mesh))
    plain = jax.jit(problem.apply, out_shardings=meshes.replicated(mesh))

    def logits(split: str, function: Callable, *params: Any) -> np.ndarray:
        def answer(*inputs: np.ndarray) -> jax.Array:
            return function(*params, *(meshes.shard_examples(mesh, one) for one in inputs))[0]

        return answers(answer, splits[split], problem.lengths)

    with bar(console, _title(method, seed), method.epochs * len(splits["train"])) as shown:
        state, history = train(
            run,
            lora.train_step(loss_function(problem.apply, method.label_smoothing), tx),
            state,
            stream,
            total,
            due=due,
            score=start.result.validation_accuracy,
            evaluate=lambda state: accuracy(logits("validation", adapted, base, state.delta), splits["validation"]),
            format_score="{:.1%}".format,
            bar=shown,
        )
    unmerged = logits("test", adapted, base, state.delta)
    merged = logits("test", plain, lora.merge(base, state.delta))
    trained = meshes.gather(state.delta)
    with processes.first_before_others():
        if processes.is_first():
            lora.save(directory / "adapter", trained, base=problem.base)  # the head is in the delta: any will do
            result = Result(
                method=method.name,
                seed=seed,
                **costs,
                adapter_bytes=stored_bytes(directory / "adapter"),
                seconds=history.seconds,
                validation_accuracy=history.evaluations[-1][1],
                test_accuracy=accuracy(unmerged, splits["test"]),
                merged_difference=float(np.abs(merged - unmerged).max()),
                merged_agreement=float(np.mean(merged.argmax(-1) == unmerged.argmax(-1))),
                losses=history.losses,
                evaluations=history.evaluations,
            )
            result.save(stored)
            outputs.clear(directory, "checkpoints")
    return Result.load(stored)


def loss_function(apply: Callable, label_smoothing: float) -> Callable:
    """Cross-entropy for the library's train step: its sum over a batch's examples, and how many they are."""
    adapted = lora.adapt(apply)

    def loss(base, delta, batch, key):
        logits, _ = adapted(base, delta, batch["tokens"], batch["mask"])
        targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], logits.shape[-1]), label_smoothing)
        each = optax.softmax_cross_entropy(logits, targets)
        return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])

    return loss


def _title(method: Method, seed: int) -> str:
    return f"{method.name} (seed {seed})" if seed else method.name
