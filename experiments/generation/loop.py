"""One token after another, in one compiled loop that stops when all texts have ended."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.generation import prompts
from experiments.generation.ngrams import forbid_repeats
from experiments.generation.sampling import filtered
from experiments.models.cache import Cache

Step = Callable[[Any, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
"""`step(params, tokens_BL, mask_BL, cache) -> (logits_BV, cache)`: the logits of the last place."""


def stepper(apply: Callable) -> Step:
    """A step from a decoder's function.

    Keep the result: what generates compiles once for each step function that it is given.

    Args:
      apply: `apply_fn` of `lora.nnx.functional(model)`, with `params` the base; or `lora.adapt(apply_fn)`, with
        `params` a tuple `(base, delta)`.
    """

    def step(params: Any, tokens_BL: jax.Array, mask_BL: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        parts = params if isinstance(params, tuple) else (params,)
        return apply(*parts, tokens_BL, mask_BL, cache=cache, last=True)

    return step


def greedy(
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None = None,
    *,
    cache: Cache,
    new_tokens: int,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    no_repeat: int = 0,
) -> jax.Array:
    """Continues each prompt with the likeliest token, again and again.

    Args:
      step: Computes the next logits; see :func:`stepper`.
      params: What `step` is given first.
      tokens_BL: Prompts, padded on either side.
      mask_BL: True at tokens, False at padding; None has no padding.
      cache: An empty one of as many rows, with slots for the prompts and the new tokens.
      new_tokens: The most tokens to add.
      eos: The token, or tokens, that end a text.
      pad: What follows the end of a text.
      no_repeat: n, to have no n-gram twice in a prompt and its continuation; 0 allows all.

    Returns:
      The new tokens, `int[batch, new_tokens]`.

    Raises:
      ValueError: The cache does not fit, or is in use.
    """
    prompts.check(tokens_BL, new_tokens, cache)
    return _continue(
        None, step, params, tokens_BL, mask_BL, cache, None, None, new_tokens, prompts.ends(eos), pad, no_repeat, None
    )


def sample(
    key: jax.Array,
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None = None,
    *,
    cache: Cache,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    no_repeat: int = 0,
) -> jax.Array:
    """Continues each prompt with tokens drawn by their probability; like :func:`greedy` but for what follows.

    Args:
      key: Of the draws.
      step: See :func:`greedy`.
      params: Likewise.
      tokens_BL: Likewise.
      mask_BL: Likewise.
      cache: Likewise.
      new_tokens: Likewise.
      temperature: See :func:`experiments.generation.sampling.filtered`.
      top_k: Likewise.
      top_p: Likewise.
      eos: See :func:`greedy`.
      pad: Likewise.
      no_repeat: Likewise.

    Raises:
      ValueError: The cache does not fit or is in use, or a choice is out of range.
    """
    prompts.check(tokens_BL, new_tokens, cache)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}, expected above 0; greedy() takes the likeliest token.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}, expected at least 1, or None for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}, expected above 0 and at most 1, or None for all.")
    return _continue(
        key,
        step,
        params,
        tokens_BL,
        mask_BL,
        cache,
        temperature,
        top_p,
        new_tokens,
        prompts.ends(eos),
        pad,
        no_repeat,
        top_k,
    )


@functools.partial(jax.jit, static_argnames=("step", "new_tokens", "eos", "pad", "no_repeat", "top_k"))
def _continue(
    key: jax.Array | None,
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    cache: Cache,
    temperature: jax.Array | None,
    top_p: jax.Array | None,
    new_tokens: int,
    eos: tuple[int, ...],
    pad: int,
    no_repeat: int,
    top_k: int | None,
) -> jax.Array:
    """Greedy without a key."""
    tokens_BL, mask_BL = prompts.align(tokens_BL, mask_BL)
    batch, length = tokens_BL.shape
    begins_B = jnp.argmax(mask_BL, axis=1)

    def choose(logits_BV: jax.Array, texts_BT: jax.Array, count: jax.Array | int) -> jax.Array:
        logits_BV = logits_BV.astype(jnp.float32)
        scores_BV = forbid_repeats(logits_BV, texts_BT, begins_B, length + count, no_repeat)
        if key is None:
            return jnp.argmax(scores_BV, axis=-1).astype(texts_BT.dtype)
        scores_BV = filtered(scores_BV, temperature=temperature, top_k=top_k, top_p=top_p)
        return jax.random.categorical(jax.random.fold_in(key, count), scores_BV).astype(texts_BT.dtype)

    def write(texts_BT: jax.Array, done_B: jax.Array, logits_BV: jax.Array, count: jax.Array | int):
        next_B = jnp.where(done_B, pad, choose(logits_BV, texts_BT, count))
        texts_BT = jax.lax.dynamic_update_slice_in_dim(texts_BT, next_B[:, None], length + count, axis=1)
        return texts_BT, done_B | prompts.is_end(next_B, eos)

    def goes_on(state: Any) -> jax.Array:
        _, done_B, _, count = state
        return (count < new_tokens) & ~jnp.all(done_B)

    def go_on(state: Any) -> Any:
        texts_BT, done_B, cache, count = state
        last_B1 = jax.lax.dynamic_slice_in_dim(texts_BT, length + count - 1, 1, axis=1)
        logits_BV, cache = step(params, last_B1, ~done_B[:, None], cache)
        return *write(texts_BT, done_B, logits_BV, count), cache, count + 1

    texts_BT = jnp.pad(tokens_BL, ((0, 0), (0, new_tokens)), constant_values=pad)
    logits_BV, cache = step(params, tokens_BL, mask_BL, cache)
    texts_BT, done_B = write(texts_BT, jnp.zeros(batch, bool), logits_BV, 0)
    texts_BT, *_ = jax.lax.while_loop(goes_on, go_on, (texts_BT, done_B, cache, jnp.ones((), jnp.int32)))
    return texts_BT[:, length:]
