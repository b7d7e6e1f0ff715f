"""Log-probabilities of the tokens of answers, by one adapted function of any delta."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora

Batch = Mapping[str, jax.Array]
"""Arrays by name, `[*rows, tokens]`: `tokens`; `labels`, the next token where the loss covers it, otherwise negative;
optionally `segments` and `positions`, see `experiments.models.decoder`."""

LogProbs = Callable[[Any, Any, Batch, jax.Array | None], jax.Array]
"""`log_probs(base, delta, batch, key) -> float32[*rows, tokens]`: of each label, 0 without a label."""

Loss = Callable[[Any, Any, Batch, jax.Array | None], tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array]]]
"""`loss(base, delta, batch, key) -> ((loss_sum, weight), metrics)`."""


@dataclass(frozen=True)
class LogProbabilities:
    """Log-probabilities by a decoder, `log_probs(base, delta, batch, key)` of any delta.

    The decoder computes the logits of a few tokens at a time, in the backward pass too (`Options.loss_chunk`): the
    complete logits never exist. Policy and reference are calls of one function, `lora_jax.adapt(apply)`.

    Attributes:
      apply: `apply_fn` of `lora.nnx.functional(model)`, with `model` a :class:`experiments.models.decoder.Decoder`.
      max_labels: The largest number of labels of a row, as a static bound; the head then computes logits only where
        there are labels. All log-probabilities of a row with more labels are NaN.
      dropout: Whether the adapters of the policy drop out, with a key.
      flatten: As for :func:`lora_jax.adapt`.

    Example:
      >>> def apply(base, tokens, segments, positions, labels_BL, max_labels):  # of 8 tokens, all equally likely
      ...     return jnp.where(labels_BL >= 0, jnp.log(8.0), 0) + 0 * base["w"]
      >>> batch = {"tokens": jnp.array([[1, 2, 3]]), "labels": jnp.array([[-1, 3, -1]])}
      >>> values = LogProbabilities(apply)({"w": jnp.zeros(())}, {}, batch)
      >>> [round(float(value), 3) for value in values[0]]
      [0.0, -2.079, 0.0]
    """

    apply: Callable
    max_labels: int | None = None
    dropout: bool = False
    flatten: bool = True

    def __call__(self, base: Any, delta: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Returns the log-probability of each label, `float32[*rows, tokens]`; 0 without a label."""
        labels = batch["labels"]
        rows = {name: batch[name].reshape(-1, labels.shape[-1]) for name in _NAMES if name in batch}
        losses_BL = self._adapted(
            base,
            delta,
            rows["tokens"],
            rows.get("segments"),
            rows.get("positions"),
            labels_BL=rows["labels"],
            max_labels=self.max_labels,
            dropout_key=key if self.dropout else None,
        )
        return jnp.where(labels >= 0, -losses_BL.reshape(labels.shape), 0.0)

    @functools.cached_property
    def _adapted(self) -> Callable:
        return lora.adapt(self.apply, flatten=self.flatten)


_NAMES = ("tokens", "labels", "segments", "positions")


def check_rows(batch: Batch, count: int, objective: str) -> None:
    """Raises a ValueError unless the batch has `count` rows for each example."""
    shape = batch["labels"].shape
    if len(shape) != 3 or shape[1] != count:
        raise ValueError(f"{objective}: labels have the shape {shape}, expected [examples, {count}, tokens].")


def summed(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Returns the sum of the values of valid examples."""
    return jnp.sum(jnp.where(valid, values, 0))
