"""The adapter and its training."""

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
from experiments.models.weights import flatten_weights
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
    """A training run before its first step.

    Attributes:
      delta: The initial adapter.
      state: The initial state.
      step: The compiled step.
      stream: The batches.
      examples: Number of training examples.
      loss: Computes the mean loss per token of a split with a delta.
    """

    delta: dict[str, Any]
    state: lora.TrainState
    step: Callable
    stream: Stream
    examples: int
    loss: Callable[[Any, str], float]


def prepare(problem: Problem, config: Config) -> Run:
    """Initializes an adapter and the step that trains it.

    Raises:
      UserError: A target matches no weight of the model, or the rank exceeds that of a weight.
    """
    if "head" in config.targets and "output/kernel" not in flatten_weights(problem.base):
        raise UserError(
            f"--targets head: the head of {config.model} is its token embedding; --targets embedding adapts both"
        )
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
    """Returns a loss function for `lora.train_step`: the sum over a batch's labels, and their number.

    The model computes the losses for a chunk of tokens at a time, so that the logits of a whole batch never exist.
    """
    adapted = lora.adapt(apply)

    def loss(base, delta, batch, key):
        losses = adapted(base, delta, batch["tokens"], labels_BL=batch["labels"])
        return jnp.sum(losses), jnp.sum(batch["labels"] >= 0)

    return loss


def run(
    prepared: Run, config: Config, directory: Path, base_loss: float, console: Console
) -> tuple[dict[str, Any], History]:
    """Trains the adapter, or resumes training.

    Args:
      prepared: From :func:`prepare`.
      config: The study's config.
      directory: The directory of the run.
      base_loss: The base's mean validation loss per token.
      console: The output of the progress bar.

    Returns:
      The trained adapter and the measurements.
    """
    total, due = loop.plan_steps(config.epochs, prepared.stream.steps_per_epoch)
    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every, best="min")
    with bar(console, config.family, config.epochs * prepared.examples) as progress:
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
            bar=progress,
        )
    return state.delta, history


def frequency_loss(train: Sequence[np.ndarray], test: Sequence[np.ndarray], vocabulary: int) -> float:
    """Returns the mean loss per token of a model that predicts each token by its frequency in training."""
    training_tokens, test_tokens = (np.concatenate(labels) for labels in (train, test))
    counts = np.bincount(training_tokens[training_tokens != NO_LABEL], minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[test_tokens[test_tokens != NO_LABEL]].mean())
