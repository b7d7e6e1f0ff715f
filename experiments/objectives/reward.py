"""A reward model: a score of a text, trained so that chosen texts score higher than rejected ones.

The score is a linear layer on the hidden state of the last token, `experiments.models.decoder_heads`; a recipe
`lora_jax.Full()` trains the new layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from experiments.objectives.dpo import preferences
from experiments.objectives.log_probabilities import Loss, summed
from experiments.objectives.reference import split

SPEC = {r"^score/kernel$": lora.Full()}
"""The recipe of the score, to be put before those of the decoder's weights."""


def scores(apply: Callable, *, dropout: bool = False) -> Callable[..., jax.Array]:
    """Returns the function that scores texts.

    Args:
      apply: `apply_fn` of `lora.nnx.functional(model)`, with `model` a
        :class:`experiments.models.decoder_heads.DecoderClassifier` of one class.
      dropout: Whether the adapters drop out, with a key.

    Returns:
      `score(base, delta, batch, key=None)`, `float32[...]` for `tokens` and `mask`, `[..., tokens]`.
    """
    adapted = lora.adapt(apply)

    def score(base: Any, delta: Any, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        shape = batch["tokens"].shape
        tokens_BL, mask_BL = (batch[name].reshape(-1, shape[-1]) for name in ("tokens", "mask"))
        return adapted(base, delta, tokens_BL, mask_BL, dropout_key=key if dropout else None)[:, 0].reshape(shape[:-1])

    return score


def reward(score: Callable[..., jax.Array], *, center: float = 0.0) -> Loss:
    r"""Returns the loss of a Bradley–Terry model, :math:`-\log\sigma(r_w - r_l - m)`.

    Args:
      score: From :func:`scores`.
      center: The weight of :math:`(r_w + r_l)^2`, which keeps scores near zero.

    Returns:
      A loss of batches whose `tokens` and `mask` are `[pairs, 2, length]`: first the chosen text, then the rejected
      one; optionally with margins `margin: float[pairs]` (:math:`m`). Weight: the number of pairs. Metrics as for
      :func:`experiments.objectives.dpo.dpo`, of scores.

    Raises:
      ValueError: (from the loss) The batch has no pairs.

    Example:
      >>> score = lambda base, delta, batch, key: batch["tokens"][..., 0].astype(jnp.float32)
      >>> batch = {"tokens": jnp.array([[[2], [2]]]), "mask": jnp.ones((1, 2, 1))}
      >>> (loss, pairs), metrics = reward(score)({}, {}, batch, None)  # equal scores
      >>> round(float(loss), 4), int(pairs)  # log 2
      (0.6931, 1)

    References:
      Ouyang et al., `InstructGPT <https://arxiv.org/abs/2203.02155>`_, 2022, Equation 1
      Touvron et al., `Llama 2 <https://arxiv.org/abs/2307.09288>`_, 2023, Equation 2 (margins)
      Eisenstein et al., `Helping or Herding? <https://arxiv.org/abs/2312.09244>`_, 2023, Section 2 (centering)
    """

    def loss(base: Any, delta: Any, batch: Mapping[str, jax.Array], key: jax.Array | None) -> Any:
        shape = batch["tokens"].shape
        if len(shape) != 3 or shape[1] != 2:
            raise ValueError(f"reward: tokens have the shape {shape}, expected [pairs, 2, length].")
        valid_N = jnp.any(batch["mask"] > 0, axis=(1, 2))
        scores_N2 = score(split(base)[0], delta, batch, key)
        losses_N = -jax.nn.log_sigmoid(scores_N2[:, 0] - scores_N2[:, 1] - batch.get("margin", 0.0))
        if center:
            losses_N = losses_N + center * jnp.sum(scores_N2, axis=1) ** 2
        return (summed(losses_N, valid_N), jnp.sum(valid_N, dtype=jnp.float32)), preferences(scores_N2, valid_N)

    return loss
