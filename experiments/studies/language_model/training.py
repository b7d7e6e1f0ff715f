"""The adapter and its training run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.language_model import Config
from experiments.errors import UserError
from experiments.studies.language_model.problem import Problem
from experiments.tasks.batching import NO_LABEL
from experiments.training import loop
from experiments.training import mesh as meshes
from experiments.training.mesh import MeshSizes
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import History, TrainingRun
from experiments.training.stream import Stream

_PATTERNS = {
    "attention": r"/attention/.*kernel$",
    "feed-forward": r"/feed_forward/.*kernel$",
    "norms": r"norm/(scale|bias)$",
    "embedding": r"^token/embedding$",
    "head": r"^output/kernel$",
}


@dataclass(frozen=True)
class Run:
    """A training run that is made ready.

    Attributes:
      delta: The adapter that it begins with.
      state: What the first step is given.
      step: The compiled step.
      stream: The batches.
      examples: How many a pass over them holds.
      loss: Mean loss a token of a split, under a delta.
    """

    delta: dict[str, Any]
    state: lora.TrainState
    step: Callable
    stream: Stream
    examples: int
    loss: Callable[[Any, str], float]


def prepare(problem: Problem, config: Config) -> Run:
    """A new adapter on the base, and the step that trains it.

    Raises:
      UserError: The model has nothing that one of the targets names, or less than the rank in a direction.
    """
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    low_rank = lora.LoRA(rank=config.rank, alpha=config.alpha)
    spec = {_PATTERNS[target]: lora.Full() if target == "norms" else low_rank for target in config.targets}
    shape = jax.ShapeDtypeStruct((1, problem.lengths[0]), jnp.int32)
    try:
        delta = lora.init(init_key, problem.base, spec, problem.apply, shape)
    except ValueError as error:
        raise UserError(f"--targets {' '.join(config.targets)}: {error}") from None
    data = problem.splits["train"]
    stream = Stream(data.sequences, data.labels, problem.lengths, config.batch_size, config.seed)
    tx = adam(config.lr, config.epochs * stream.steps_per_epoch, warmup=config.warmup, clip=config.clip)
    loss = loss_function(problem.apply)
    summed = jax.jit(loss)

    def mean(delta: Any, split: str) -> float:
        sums = [summed(problem.base, delta, batch, None) for batch in problem.batches(split)]
        return sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)

    state = lora.TrainState.create(problem.base, delta, tx, train_key)
    return Run(delta, state, lora.train_step(loss, tx), stream, len(data), mean)


def loss_function(apply: Callable) -> Callable:
    """For the library's train step: the loss summed over a batch's labels, and how many they are.

    The model computes the losses from its last hidden states and its head, a chunk of tokens at a time: all logits of
    a batch exist at no time.
    """
    adapted = lora.adapt(apply)

    def loss(base, delta, batch, key):
        losses = adapted(base, delta, batch["tokens"], labels_BL=batch["labels"])
        return jnp.sum(losses), jnp.sum(batch["labels"] >= 0)

    return loss


def run(
    prepared: Run, config: Config, directory: Path, base_loss: float, console: Console
) -> tuple[dict[str, Any], History]:
    """Trains, or goes on with training.

    Args:
      prepared: What to train.
      config: Of the study.
      directory: Of the run alone.
      base_loss: Mean loss a token of the base on validation.
      console: Where the bar is drawn.

    Returns:
      The trained adapter and what was measured.
    """
    total, due = loop.plan_steps(config.epochs, prepared.stream.steps_per_epoch)
    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every, best="min")
    with bar(console, config.family, config.epochs * prepared.examples) as shown:
        state, history = loop.train(
            run,
            prepared.step,
            prepared.state,
            prepared.stream,
            total,
            due=due,
            score=base_loss,
            evaluate=lambda state: prepared.loss(state.delta, "validation"),
            format_score=lambda loss: f"perplexity {np.exp(loss):.1f}",
            bar=shown,
        )
    return state.delta, history


def frequency_loss(train: Sequence[np.ndarray], test: Sequence[np.ndarray], vocabulary: int) -> float:
    """Mean loss a token of a model that knows how frequent each token is in training, and nothing else."""
    learned, asked = (np.concatenate(labels) for labels in (train, test))
    counts = np.bincount(learned[learned != NO_LABEL], minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[asked[asked != NO_LABEL]].mean())
