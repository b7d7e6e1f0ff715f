"""GRPO: policy gradients with the advantage of an answer over the other answers to its prompt."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.objectives.log_probabilities import Batch, LogProbs, Loss, summed
from experiments.objectives.reference import reference_log_probs, split

Normalize = Literal["sequence", "tokens", "constant"]


def advantages(rewards_PG: jax.Array, *, scale: Literal["group", "batch", "none"] = "group") -> jax.Array:
    """Returns the advantage of each answer over the answers of its group.

    Args:
      rewards_PG: The rewards of G answers to each of P prompts.
      scale: The standard deviation that divides the difference from the group's mean: of the group, of all rewards, or
        none (Dr. GRPO).

    Returns:
      `float32[prompts, answers]`.

    Raises:
      ValueError: A group has one answer, or `scale` is unknown.

    Example:
      >>> advantages(jnp.array([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(2).tolist()
      [[-0.8700000047683716, -0.8700000047683716, 0.8700000047683716, 0.8700000047683716], [0.0, 0.0, 0.0, 0.0]]

    References:
      Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024, Section 4.1.2
      Liu et al., `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_, 2025, Section 3.2
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"advantages: rewards have the shape {rewards_PG.shape}, expected [prompts, 2 or more].")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"advantages(scale={scale!r}): expected group, batch or none.")
    rewards_PG = rewards_PG.astype(jnp.float32)
    centered_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if scale == "none":
        return centered_PG
    return centered_PG / (jnp.std(rewards_PG, axis=1 if scale == "group" else None, keepdims=True, ddof=1) + 1e-4)


def grpo(
    log_probs: LogProbs,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    beta: float = 0.0,
    normalize: Normalize = "sequence",
    max_tokens: int | None = None,
) -> Loss:
    r"""Returns the loss of group relative policy optimization.

    With :math:`\rho` the ratio of a token's probability to that at sampling and :math:`A` the answer's advantage, the
    loss of a token is :math:`-\min(\rho A, \mathrm{clip}(\rho, 1-\varepsilon, 1+\varepsilon_{high}) A)
    + \beta\,(e^{q-p} - (q-p) - 1)`, with :math:`p` and :math:`q` the log-probabilities of policy and reference.

    GRPO: the defaults. DAPO: `clip_high=0.28, normalize="tokens"`. Dr. GRPO: `normalize="constant"`, and advantages
    with `scale="none"`.

    Args:
      log_probs: Usually :class:`experiments.objectives.log_probabilities.LogProbabilities`.
      clip: :math:`\varepsilon`.
      clip_high: :math:`\varepsilon_{high}`; None is `clip`.
      beta: The weight of the divergence from the reference; with 0 there is no reference.
      normalize: The mean over the tokens of an answer and then over answers, the mean over all tokens, or the sum over
        an answer's tokens divided by `max_tokens` and the mean over answers.
      max_tokens: The maximum number of tokens of an answer, for `constant`.

    Returns:
      A loss of batches of `[answers, tokens]` with `advantages: float32[answers]`, and with `old_log_probs` (the
      log-probabilities at sampling) if they were sampled before an earlier step. Weight: the number of answers, or of
      tokens; the loss of microbatches adds up to that of the batch. Metrics, with the same weight: `kl`, the divergence
      from the reference (0 without one); `clipped`, the fraction of tokens whose gradient is clipped.

    Raises:
      ValueError: A value is out of range; (from the loss) see
        :func:`experiments.objectives.reference.reference_log_probs`.

    Example:
      >>> batch = {"labels": jnp.array([[3, 4], [5, -1]]), "advantages": jnp.array([1.0, -1.0])}
      >>> log_probs = lambda base, delta, batch, key: jnp.where(batch["labels"] >= 0, -1.0, 0.0)
      >>> [float(x) for x in grpo(log_probs)({}, {}, batch, None)[0]]
      [0.0, 2.0]
      >>> [float(x) for x in grpo(log_probs, clip_high=0.28, normalize="tokens")({}, {}, batch, None)[0]]
      [-1.0, 3.0]

    References:
      Shao et al., `DeepSeekMath <https://arxiv.org/abs/2402.03300>`_, 2024, Equations 3 and 4
      Yu et al., `DAPO <https://arxiv.org/abs/2503.14476>`_, 2025, Equation 8
      Liu et al., `Dr. GRPO <https://arxiv.org/abs/2503.20783>`_, 2025, Section 3.2
    """
    high = clip if clip_high is None else clip_high
    if not 0 < clip < 1 or high <= 0:
        raise ValueError(f"grpo(clip={clip}, clip_high={clip_high}): expected 0 < clip < 1 and clip_high above 0.")
    if normalize not in ("sequence", "tokens", "constant"):
        raise ValueError(f"grpo(normalize={normalize!r}): expected sequence, tokens or constant.")
    if (normalize == "constant") != (max_tokens is not None):
        raise ValueError(f"grpo(normalize={normalize!r}, max_tokens={max_tokens}): constant needs max_tokens.")

    def loss(base: Any, delta: Any, batch: Batch, key: jax.Array | None) -> Any:
        mask_BL = batch["labels"] >= 0
        counts_B1 = jnp.sum(mask_BL, axis=1, keepdims=True, dtype=jnp.float32)
        policy_BL = log_probs(split(base)[0], delta, batch, key)
        old_BL = batch["old_log_probs"] if "old_log_probs" in batch else jax.lax.stop_gradient(policy_BL)
        ratio_BL = jnp.exp(jnp.where(mask_BL, policy_BL - old_BL, 0))
        advantages_B1 = batch["advantages"][:, None]
        plain_BL, clipped_BL = ratio_BL * advantages_B1, jnp.clip(ratio_BL, 1 - clip, 1 + high) * advantages_B1
        losses_BL = -jnp.minimum(plain_BL, clipped_BL)
        kl_BL = jnp.zeros_like(losses_BL)
        if beta:
            gap_BL = reference_log_probs(log_probs, base, delta, batch, policy_BL) - policy_BL
            kl_BL = jnp.exp(gap_BL) - gap_BL - 1
            losses_BL = losses_BL + beta * kl_BL
        if normalize == "tokens":
            weight, per_token_B1 = jnp.sum(counts_B1), jnp.ones(counts_B1.shape)
        else:
            weight = jnp.sum(counts_B1 > 0, dtype=jnp.float32)
            per_token_B1 = 1 / (
                jnp.maximum(counts_B1, 1.0) if max_tokens is None else jnp.full(counts_B1.shape, max_tokens)
            )
        values = {"kl": kl_BL, "clipped": (clipped_BL < plain_BL).astype(jnp.float32)}
        metrics = {name: summed(jax.lax.stop_gradient(value) * per_token_B1, mask_BL) for name, value in values.items()}
        return (summed(losses_BL * per_token_B1, mask_BL), weight), metrics

    return loss
