"""SimPO: preferences by the mean log-probability of an answer's tokens, without a reference."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.dpo import preferences
from experiments.objectives.log_probabilities import Batch, LogProbs, Loss, check_rows, summed
from experiments.objectives.reference import split


def simpo(log_probs: LogProbs, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    r"""Returns the loss of simple preference optimization.

    .. math:: -\log\sigma\Big(\frac{\beta}{|y_w|}\log\pi(y_w|x) - \frac{\beta}{|y_l|}\log\pi(y_l|x) - \gamma\Big)

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      beta: The factor of mean log-probabilities.
      gamma: The margin by which the chosen answer's reward is to exceed the rejected one's.
      label_smoothing: The probability that chosen and rejected are exchanged, below 0.5.

    Returns:
      A loss of batches as for :func:`experiments.objectives.dpo.dpo`, with the same metrics.

    Raises:
      ValueError: A value is out of range, or (from the loss) the batch has no pairs.

    Example:
      >>> labels = jnp.array([[[3, 4], [5, -1]]])
      >>> log_probs = lambda base, delta, batch, key: jnp.where(batch["labels"] >= 0, -1.0, 0.0)
      >>> (loss, pairs), metrics = simpo(log_probs, gamma=0.0)({}, {}, {"labels": labels}, None)  # equal means
      >>> round(float(loss), 4), int(pairs)  # log 2
      (0.6931, 1)

    References:
      Meng et al., `SimPO <https://arxiv.org/abs/2405.14734>`_, 2024, Equation 6
    """
    if beta <= 0:
        raise ValueError(f"simpo(beta={beta}): expected a positive number.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"simpo(label_smoothing={label_smoothing}): expected at least 0 and below 0.5.")

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        check_rows(batch, 2, "simpo")
        counts_N2 = jnp.sum(batch["labels"] >= 0, axis=-1, dtype=jnp.float32)
        valid_N = jnp.any(counts_N2 > 0, axis=-1)
        sums_N2 = jnp.sum(log_probs(split(base)[0], delta, batch, key), axis=-1)
        rewards_N2 = beta * sums_N2 / jnp.maximum(counts_N2, 1.0)
        margin_N = rewards_N2[:, 0] - rewards_N2[:, 1] - gamma
        losses_N = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_N)
        losses_N = losses_N - label_smoothing * jax.nn.log_sigmoid(-margin_N)
        return (summed(losses_N, valid_N), jnp.sum(valid_N, dtype=jnp.float32)), preferences(rewards_N2, valid_N)

    return loss
