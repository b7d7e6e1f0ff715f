"""ORPO: fine-tuning on the chosen answer and a preference by odds in one loss, without a reference."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.objectives.dpo import preferences
from experiments.objectives.log_probabilities import Batch, LogProbs, Loss, check_rows, summed
from experiments.objectives.reference import split


def orpo(log_probs: LogProbs, *, beta: float = 0.1, likelihood: Literal["text", "answer"] = "text") -> Loss:
    r"""Returns the loss of odds ratio preference optimization.

    With :math:`P` the geometric mean of the probabilities of an answer's tokens:

    .. math:: \mathcal L_{NLL} - \beta \log\sigma\Big(\log\frac{P(y_w)}{1-P(y_w)} - \log\frac{P(y_l)}{1-P(y_l)}\Big)

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      beta: The weight of the odds ratio (:math:`\lambda` in the paper).
      likelihood: The tokens of the negative log-likelihood: of the chosen text with its prompt, as the authors and TRL
        compute it, or only of the chosen answer.

    Returns:
      A loss of batches as for :func:`experiments.objectives.dpo.dpo`, with the same metrics, and `nll`, the mean over
      tokens times the number of pairs. The mean is over the tokens of the batch; with microbatches, over those of each,
      as in TRL. A row holds one text, and only padding follows its last label.

    Raises:
      ValueError: A value is out of range, or (from the loss) the batch has no pairs.

    Example:
      >>> labels = jnp.array([[[3, 4], [5, -1]]])
      >>> log_probs = lambda base, delta, batch, key: jnp.where(batch["labels"] >= 0, -1.0, 0.0)
      >>> (loss, pairs), metrics = orpo(log_probs, beta=1)({}, {}, {"tokens": labels, "labels": labels}, None)
      >>> round(float(loss), 4), int(pairs)  # 1 + log 2
      (1.6931, 1)

    References:
      Hong et al., `ORPO <https://arxiv.org/abs/2403.07691>`_, 2024, Equations 4, 6 and 7
    """
    if beta < 0:
        raise ValueError(f"orpo(beta={beta}): expected at least 0.")
    if likelihood not in ("text", "answer"):
        raise ValueError(f"orpo(likelihood={likelihood!r}): expected text or answer.")

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        check_rows(batch, 2, "orpo")
        labels_N2L = batch["labels"]
        answers_N2L = labels_N2L >= 0
        counts_N2 = jnp.sum(answers_N2L, axis=-1, dtype=jnp.float32)
        valid_N = jnp.all(counts_N2 > 0, axis=-1)
        if likelihood == "text":
            labels_N2L = labels_N2L.at[:, 0].set(_text_labels(batch["tokens"][:, 0], labels_N2L[:, 0]))
        log_probs_N2L = log_probs(split(base)[0], delta, {**batch, "labels": labels_N2L}, key)
        tokens = jnp.sum(labels_N2L[:, 0] >= 0, dtype=jnp.float32)
        pairs = jnp.sum(valid_N, dtype=jnp.float32)
        nll = -jnp.sum(log_probs_N2L[:, 0]) * pairs / jnp.maximum(tokens, 1.0)
        sums_N2 = jnp.sum(jnp.where(answers_N2L, log_probs_N2L, 0), axis=-1)
        means_N2 = jnp.where(valid_N[:, None], sums_N2 / jnp.maximum(counts_N2, 1.0), -1.0)
        log_odds_N2 = means_N2 - _log1mexp(means_N2)
        odds_ratio_N = -jax.nn.log_sigmoid(log_odds_N2[:, 0] - log_odds_N2[:, 1])
        metrics = preferences(beta * means_N2, valid_N) | {"nll": jax.lax.stop_gradient(nll)}
        return (nll + beta * summed(odds_ratio_N, valid_N), pairs), metrics

    return loss


def _text_labels(tokens_NL: jax.Array, labels_NL: jax.Array) -> jax.Array:
    """Returns the next token at every position up to the last label."""
    numbers_1L = jnp.arange(labels_NL.shape[1])[None]
    last_N1 = jnp.max(jnp.where(labels_NL >= 0, numbers_1L, -1), axis=1, keepdims=True)
    next_NL = jnp.roll(tokens_NL, -1, axis=1).astype(labels_NL.dtype)
    return jnp.where(labels_NL >= 0, labels_NL, jnp.where(numbers_1L < last_N1, next_NL, -1))


def _log1mexp(x: jax.Array) -> jax.Array:
    """Returns log(1 - exp(x)) for x below 0, precisely near 0 and far from it."""
    small = x < -math.log(2)
    return jnp.where(
        small, jnp.log1p(-jnp.exp(jnp.where(small, x, -1.0))), jnp.log(-jnp.expm1(jnp.where(small, -0.5, x)))
    )
