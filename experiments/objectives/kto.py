"""KTO: answers that are good or bad by themselves, without pairs."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.objectives.log_probabilities import Batch, LogProbs, Loss, check_rows, summed
from experiments.objectives.reference import log_ratios


def kto(
    log_probs: LogProbs, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Loss:
    r"""Returns the loss of Kahneman–Tversky optimization.

    With :math:`r` the log-ratio of policy and reference of an answer, the loss is
    :math:`\lambda_D\,(1-\sigma(\beta(r-z)))` for a desirable answer and :math:`\lambda_U\,(1-\sigma(\beta(z-r)))` for
    an undesirable one. :math:`z\ge 0` estimates the divergence of policy and reference as the mean log-ratio of answers
    to other prompts; no gradient flows through it.

    :math:`z` is of the whole batch on a mesh. Microbatches (`accumulate`) estimate one each, as do the devices of
    `pmap`: use microbatches of several examples.

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      beta: How strongly the policy is held to the reference.
      desirable_weight: The weight of desirable answers. The paper recommends weights for which
        `desirable_weight * desirable / (undesirable_weight * undesirable)`, with the numbers of answers, is from 1 to
        4/3.
      undesirable_weight: The weight of undesirable answers.

    Returns:
      A loss of batches with `desirable: bool[examples]` and arrays `[examples, 2, tokens]`: first the prompt with its
      answer, then with the answer of another example. Weight: the number of examples. Metrics: `kl`, :math:`z` times
      the number of examples; `desirable`, the number of desirable answers; `chosen` and `rejected`, the sums of their
      rewards :math:`\beta r`.

    Raises:
      ValueError: A value is out of range, or (from the loss) the batch has not two rows per example.

    Example:
      >>> batch = {"labels": jnp.array([[[3, 4], [5, -1]]]), "desirable": jnp.array([True])}
      >>> log_probs = lambda base, delta, batch, key: jnp.where(batch["labels"] >= 0, -1.0, 0.0)
      >>> (loss, examples), metrics = kto(log_probs)({}, {}, batch, None)  # the policy is the reference
      >>> float(loss), int(examples)
      (0.5, 1)

    References:
      Ethayarajh et al., `KTO <https://arxiv.org/abs/2402.01306>`_, 2024, Equation 8
    """
    if beta <= 0:
        raise ValueError(f"kto(beta={beta}): expected a positive number.")

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        check_rows(batch, 2, "kto")
        desirable_N = batch["desirable"]
        valid_N = jnp.any(batch["labels"][:, 0] >= 0, axis=-1)
        count = jnp.sum(valid_N, dtype=jnp.float32)
        answers, others = _row(batch, 0), _row(batch, 1)
        reward_N = jnp.sum(log_ratios(log_probs, base, delta, answers, key), axis=-1)
        # Without a gradient, the backward pass has no part in it.
        other_N = jnp.sum(log_ratios(log_probs, base, jax.lax.stop_gradient(delta), others, None), axis=-1)
        z = jnp.maximum(summed(other_N, valid_N) / jnp.maximum(count, 1.0), 0)
        distance_N = jnp.where(desirable_N, reward_N - z, z - reward_N)
        weights_N = jnp.where(desirable_N, desirable_weight, undesirable_weight)
        losses_N = weights_N * (1 - jax.nn.sigmoid(beta * distance_N))
        reward_N = beta * jax.lax.stop_gradient(reward_N)
        metrics = {
            "kl": z * count,
            "desirable": jnp.sum(valid_N & desirable_N, dtype=jnp.float32),
            "chosen": summed(reward_N, valid_N & desirable_N),
            "rejected": summed(reward_N, valid_N & ~desirable_N),
        }
        return (summed(losses_N, valid_N), count), metrics

    return loss


def _row(batch: Batch, index: int) -> Batch:
    """Returns one of the rows of each example, `[examples, tokens]` of `[examples, rows, tokens]`."""
    return {name: value[:, index] for name, value in batch.items() if value.ndim == 3}
