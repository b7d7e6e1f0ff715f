"""Direct preference optimization: a better and a worse answer, and a reference to which the policy is held."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.objectives.log_probabilities import Batch, LogProbs, Loss, check_rows, summed
from experiments.objectives.reference import log_ratios

Kind = Literal["sigmoid", "hinge", "ipo", "robust"]


def dpo(
    log_probs: LogProbs,
    *,
    beta: float = 0.1,
    kind: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Loss:
    r"""Returns the loss of direct preference optimization and its relatives.

    With :math:`\Delta` the log-ratio of policy and reference of the chosen answer minus that of the rejected one, and
    :math:`\ell` the loss of a pair, a label is wrong with probability :math:`\varepsilon`:
    :math:`(1-\varepsilon)\,\ell(\Delta) + \varepsilon\,\ell(-\Delta)`.

    ======= ==========================================================================================
    sigmoid :math:`-\log\sigma(\beta\Delta)`
    hinge   :math:`\max(0, 1-\beta\Delta)`
    ipo     :math:`(\Delta - 1/(2\beta))^2`, with :math:`\Delta` of mean log-probabilities of tokens
    robust  sigmoid, unbiased if labels are wrong: :math:`((1-\varepsilon)\,\ell(\Delta) -
            \varepsilon\,\ell(-\Delta)) / (1-2\varepsilon)`
    ======= ==========================================================================================

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      beta: How strongly the policy is held to the reference.
      kind: The loss of a pair.
      label_smoothing: The probability that chosen and rejected are exchanged, below 0.5.
      length_normalized: Whether to use mean log-probabilities of tokens instead of sums; `ipo` always does.

    Returns:
      A loss of batches whose arrays are `[pairs, 2, tokens]`: first the chosen answer, then the rejected one, each with
      its prompt, which has no labels. With `reference_log_probs` in the batch, a step does not compute them. Weight:
      the number of pairs. Metrics: `chosen` and `rejected`, the implicit rewards :math:`\beta` times the log-ratio;
      `margin`, their difference; `accuracy`, 1 where it is positive.

    Raises:
      ValueError: A value is out of range, or (from the loss) the batch has no pairs.

    Example:
      >>> labels = jnp.array([[[3, 4], [5, -1]]])
      >>> log_probs = lambda base, delta, batch, key: jnp.where(batch["labels"] >= 0, delta.get("w", -1.0), 0.0)
      >>> (loss, pairs), metrics = dpo(log_probs)({}, {}, {"labels": labels}, None)  # the policy is the reference
      >>> round(float(loss), 4), int(pairs)  # log 2
      (0.6931, 1)

    References:
      Rafailov et al., `DPO <https://arxiv.org/abs/2305.18290>`_, 2023, Equation 7
      Azar et al., `IPO <https://arxiv.org/abs/2310.12036>`_, 2023, Equation 17
      Zhao et al., `SLiC-HF <https://arxiv.org/abs/2305.10425>`_, 2023, Equation 1 (hinge)
      Ray Chowdhury et al., `Robust DPO <https://arxiv.org/abs/2403.00409>`_, 2024, Equations 9 and 12
    """
    if beta <= 0:
        raise ValueError(f"dpo(beta={beta}): expected a positive number.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo(label_smoothing={label_smoothing}): expected at least 0 and below 0.5.")
    if kind not in _LOSSES:
        raise ValueError(f"dpo(kind={kind!r}): expected one of {', '.join(_LOSSES)}.")
    pair_loss, flipped = _LOSSES[kind], -label_smoothing if kind == "robust" else label_smoothing

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        check_rows(batch, 2, "dpo")
        counts_N2 = jnp.sum(batch["labels"] >= 0, axis=-1, dtype=jnp.float32)
        valid_N = jnp.any(counts_N2 > 0, axis=-1)
        ratios_N2 = jnp.sum(log_ratios(log_probs, base, delta, batch, key), axis=-1)
        scores_N2 = ratios_N2 / jnp.maximum(counts_N2, 1.0) if kind == "ipo" or length_normalized else ratios_N2
        score_N = scores_N2[:, 0] - scores_N2[:, 1]
        losses_N = (1 - label_smoothing) * pair_loss(score_N, beta)
        if label_smoothing:
            losses_N = losses_N + flipped * pair_loss(-score_N, beta)
        if kind == "robust":
            losses_N = losses_N / (1 - 2 * label_smoothing)
        return (summed(losses_N, valid_N), jnp.sum(valid_N, dtype=jnp.float32)), preferences(beta * ratios_N2, valid_N)

    return loss


def preferences(rewards_N2: jax.Array, valid_N: jax.Array) -> dict[str, jax.Array]:
    """Returns the metrics of pairs, sums over the valid ones: their rewards, margins and how many are positive."""
    rewards_N2 = jax.lax.stop_gradient(rewards_N2)
    margin_N = rewards_N2[:, 0] - rewards_N2[:, 1]
    values = {"chosen": rewards_N2[:, 0], "rejected": rewards_N2[:, 1], "margin": margin_N, "accuracy": margin_N > 0}
    return {name: summed(value.astype(jnp.float32), valid_N) for name, value in values.items()}


def _sigmoid(score: jax.Array, beta: float) -> jax.Array:
    return -jax.nn.log_sigmoid(beta * score)


_LOSSES = {
    "sigmoid": _sigmoid,
    "robust": _sigmoid,
    "hinge": lambda score, beta: jax.nn.relu(1 - beta * score),
    "ipo": lambda score, beta: (score - 1 / (2 * beta)) ** 2,
}
