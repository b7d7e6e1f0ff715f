"""Greedy decoding and sampling, in a compiled loop that stops when all texts have ended."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.generation import prompts
from experiments.generation.ngrams import forbid_repeats
from experiments.generation.sampling import filter_logits
from experiments.models.cache import Cache

Step = Callable[[Any, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
"""`step(params, tokens_BL, mask_BL, cache) -> (logits_BV, cache)`: computes the logits of the last position."""


def make_step(apply: Callable) -> Step:
    """Returns a step function of a decoder.

    Reuse the result: the generation functions are compiled once for each step function.

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
    prompt_repeats: bool = False,
) -> jax.Array:
    """Continues each prompt with the likeliest tokens.

    Args:
      step: Computes the next logits; see :func:`make_step`.
      params: The first argument of `step`.
      tokens_BL: Prompts, padded on either side; with a used cache, what follows the tokens in it, at least one per row.
      mask_BL: True at tokens, False at padding. None: no padding.
      cache: A cache with the same number of rows and free slots for prompts and new tokens: an empty one, or one that
        holds the beginning of each row; see :func:`experiments.generation.prefill`.
      new_tokens: Maximum number of tokens to add.
      eos: The token or tokens that end a text.
      pad: The token after the end of a text.
      no_repeat: The size n of n-grams that may not occur twice in a prompt and its continuation; 0 allows all. Others
        need an empty cache, unless `prompt_repeats`.
      prompt_repeats: Whether n-grams of the prompt may occur again, so that only those of the continuation may not.

    Returns:
      The new tokens, `int[batch, new_tokens]`.

    Raises:
      ValueError: The cache does not fit.
    """
    prompts.check(tokens_BL, new_tokens, cache, 0 if prompt_repeats else no_repeat)
    return _continue(
        None,
        step,
        params,
        tokens_BL,
        mask_BL,
        cache,
        None,
        None,
        new_tokens,
        prompts.ends(eos),
        pad,
        no_repeat,
        None,
        prompt_repeats,
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
    """Continues each prompt with sampled tokens.

    Args:
      key: The random key.
      step: See :func:`greedy`, also for the other arguments that are not described here.
      params: The first argument of `step`.
      tokens_BL: Prompts, padded on either side; with a used cache, what follows the tokens in it, at least one per row.
      mask_BL: True at tokens, False at padding.
      cache: See :func:`greedy`.
      new_tokens: Maximum number of tokens to add.
      temperature: See :func:`experiments.generation.sampling.filter_logits`.
      top_k: See :func:`experiments.generation.sampling.filter_logits`.
      top_p: See :func:`experiments.generation.sampling.filter_logits`.
      eos: The token or tokens that end a text.
      pad: The token after the end of a text.
      no_repeat: See :func:`greedy`.

    Returns:
      The new tokens, `int[batch, new_tokens]`.

    Raises:
      ValueError: The cache does not fit, or an option is out of range.
    """
    prompts.check(tokens_BL, new_tokens, cache, no_repeat)
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}, expected above 0; greedy() selects the likeliest token.")
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
        False,
    )


@functools.partial(
    jax.jit, static_argnames=("step", "new_tokens", "eos", "pad", "no_repeat", "top_k", "prompt_repeats")
)
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
    prompt_repeats: bool,
) -> jax.Array:
    """Samples with a key; selects the likeliest tokens without one."""
    tokens_BL, mask_BL = prompts.align(tokens_BL, mask_BL)
    batch, length = tokens_BL.shape
    begins_B = jnp.full(batch, length) if prompt_repeats else jnp.argmax(mask_BL, axis=1)

    def choose(logits_BV: jax.Array, texts_BT: jax.Array, count: jax.Array | int) -> jax.Array:
        logits_BV = logits_BV.astype(jnp.float32)
        scores_BV = forbid_repeats(logits_BV, texts_BT, begins_B, length + count, no_repeat)
        if key is None:
            return jnp.argmax(scores_BV, axis=-1).astype(texts_BT.dtype)
        scores_BV = filter_logits(scores_BV, temperature=temperature, top_k=top_k, top_p=top_p)
        return jax.random.categorical(jax.random.fold_in(key, count), scores_BV).astype(texts_BT.dtype)

    def append(texts_BT: jax.Array, done_B: jax.Array, logits_BV: jax.Array, count: jax.Array | int):
        next_B = jnp.where(done_B, pad, choose(logits_BV, texts_BT, count))
        texts_BT = jax.lax.dynamic_update_slice_in_dim(texts_BT, next_B[:, None], length + count, axis=1)
        return texts_BT, done_B | prompts.is_end(next_B, eos)

    def should_continue(state: Any) -> jax.Array:
        _, done_B, _, count = state
        return (count < new_tokens) & ~jnp.all(done_B)

    def extend(state: Any) -> Any:
        texts_BT, done_B, cache, count = state
        last_B1 = jax.lax.dynamic_slice_in_dim(texts_BT, length + count - 1, 1, axis=1)
        logits_BV, cache = step(params, last_B1, ~done_B[:, None], cache)
        return *append(texts_BT, done_B, logits_BV, count), cache, count + 1

    texts_BT = jnp.pad(tokens_BL, ((0, 0), (0, new_tokens)), constant_values=pad)
    logits_BV, cache = step(params, tokens_BL, mask_BL, cache)
    texts_BT, done_B = append(texts_BT, jnp.zeros(batch, bool), logits_BV, 0)
    texts_BT, *_ = jax.lax.while_loop(should_continue, extend, (texts_BT, done_B, cache, jnp.ones((), jnp.int32)))
    return texts_BT[:, length:]
