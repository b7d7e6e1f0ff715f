"""Answers that a policy samples, as batches of policy-gradient objectives and of on-policy distillation."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments import generation
from experiments.generation.prompts import align
from experiments.models.cache import Cache


def rollouts(
    key: jax.Array,
    step: generation.Step,
    params: Any,
    tokens_PL: jax.Array,
    mask_PL: jax.Array,
    *,
    cache: Cache,
    group: int,
    new_tokens: int,
    eos: int | Sequence[int] | None,
    pad: int = 0,
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
    """Samples a group of answers to each prompt.

    Args:
      key: A PRNG key.
      step: `generation.make_step(lora.adapt(apply_fn))`.
      params: `(base, delta)`.
      tokens_PL: Prompts, padded on either side.
      mask_PL: True at tokens.
      cache: An empty cache of `prompts` rows, with slots for prompts and new tokens.
      group: The number of answers to each prompt.
      new_tokens: The maximum number of tokens of an answer.
      eos: The token or tokens that end an answer; the answer includes it.
      pad: The token after the end.
      temperature: Divides the logits. The ratios of :func:`experiments.objectives.grpo.grpo` are those of temperature
        1.

    Returns:
      A batch of `[prompts * group, length + new_tokens]`, the answers to a prompt one after another: `tokens`,
      `segments` (1 at tokens, 0 at padding) and `labels`. The answer of a row is `tokens[:, length:]` where `segments`
      is 1.

    Raises:
      ValueError: See :func:`sample_group`.
    """
    new_BT = sample_group(
        key, step, params, tokens_PL, mask_PL,
        cache=cache, group=group, new_tokens=new_tokens, temperature=temperature, eos=eos, pad=pad,
    )  # fmt: skip
    tokens_BL, mask_BL = (jnp.repeat(array, group, axis=0) for array in (tokens_PL, mask_PL.astype(bool)))
    return join_answers(tokens_BL, mask_BL, new_BT, eos, pad)


def sample_group(
    key: jax.Array,
    step: generation.Step,
    params: Any,
    tokens_PL: jax.Array,
    mask_PL: jax.Array,
    *,
    cache: Cache,
    group: int,
    new_tokens: int,
    **options: Any,
) -> jax.Array:
    """Samples several continuations of each prompt, which is read once.

    Args:
      key: A PRNG key.
      step: See :func:`experiments.generation.make_step`.
      params: The first argument of `step`.
      tokens_PL: Prompts, padded on either side; with a used cache, what follows the tokens in it, at least one per row.
      mask_PL: True at tokens.
      cache: A cache of `prompts` rows, with slots for prompts and new tokens; empty, or with the beginnings of prompts.
      group: The number of continuations of each prompt.
      new_tokens: The maximum number of tokens of a continuation.
      **options: See :func:`experiments.generation.sample`.

    Returns:
      The new tokens, `int[prompts * group, new_tokens]`, the continuations of a prompt one after another.

    Raises:
      ValueError: See :func:`experiments.generation.sample`.
    """
    tokens_PL, mask_PL = align(tokens_PL, mask_PL)
    if tokens_PL.shape[1] > 1:
        cache = generation.prefill(step, params, tokens_PL[:, :-1], mask_PL[:, :-1], cache=cache, copies=group)
    else:
        cache = cache.select(jnp.repeat(jnp.arange(len(tokens_PL)), group))
    last_B1 = jnp.repeat(tokens_PL[:, -1:], group, axis=0)
    return generation.sample(key, step, params, last_B1, cache=cache, new_tokens=new_tokens, **options)


def join_answers(
    tokens_BL: jax.Array, mask_BL: jax.Array, new_BT: jax.Array, eos: int | Sequence[int] | None, pad: int = 0
) -> dict[str, jax.Array]:
    """Returns prompts with their answers as a batch, see :func:`rollouts`.

    Example:
      >>> prompt, mask, new = jnp.array([[5, 6]]), jnp.array([[True, True]]), jnp.array([[7, 2, 9]])
      >>> batch = join_answers(prompt, mask, new, eos=2)
      >>> batch["tokens"].tolist(), batch["segments"].tolist(), batch["labels"].tolist()
      ([[5, 6, 7, 2, 0]], [[1, 1, 1, 1, 0]], [[-1, 7, 2, -1, -1]])
    """
    tokens_BL, mask_BL = align(tokens_BL, mask_BL)
    ends_BT = jnp.isin(new_BT, jnp.atleast_1d(jnp.asarray(() if eos is None else eos, new_BT.dtype)))
    # The token that ends an answer belongs to it.
    answer_BT = jnp.cumsum(ends_BT, axis=1) - ends_BT.astype(jnp.int32) == 0
    tokens_BS = jnp.concatenate([tokens_BL, jnp.where(answer_BT, new_BT, pad).astype(tokens_BL.dtype)], axis=1)
    segments_BS = jnp.concatenate([mask_BL, answer_BT], axis=1)
    targets_BS = jnp.concatenate([jnp.zeros_like(mask_BL), answer_BT], axis=1)
    labels_BS = jnp.where(jnp.roll(targets_BS, -1, axis=1), jnp.roll(tokens_BS, -1, axis=1), -1).at[:, -1].set(-1)
    return {"tokens": tokens_BS, "segments": segments_BS.astype(jnp.int32), "labels": labels_BS}
