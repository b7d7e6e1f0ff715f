"""Computes keys and values of prompts, or of their common beginning, before generation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.generation import prompts
from experiments.generation.loop import Step
from experiments.models.cache import Cache


def prefill(
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None = None,
    *,
    cache: Cache,
    copies: int = 1,
) -> Cache:
    """Returns a cache with keys and values of tokens, from which generation continues.

    The beginning that prompts have in common is computed once: prefill one row with `copies` for all prompts, and pass
    the result and the rest of each prompt to :func:`experiments.generation.greedy`. For several samples per prompt,
    prefill all tokens but the last of each prompt with `copies`, and continue from the repeated last tokens.

    Args:
      step: Computes the next logits; see :func:`experiments.generation.make_step`.
      params: The first argument of `step`.
      tokens_BL: Tokens, padded on either side.
      mask_BL: True at tokens, False at padding. None: no padding.
      cache: A cache with the same number of rows and enough free slots; empty, or from an earlier call.
      copies: The number of rows of the result for each row of tokens; they are next to each other.

    Raises:
      ValueError: The cache does not fit.

    Example:
      >>> from experiments.models import llama, location
      >>> from flax import nnx
      >>> import lora_jax as lora
      >>> from experiments import generation
      >>> model = llama.load(location.find("tiny-llama"))
      >>> apply, base = lora.nnx.functional(model)
      >>> step = generation.make_step(apply)
      >>> shared = generation.prefill(step, base, jnp.array([[1, 7, 9, 4]]), cache=model.cache(1, 8), copies=2)
      >>> generation.greedy(step, base, jnp.array([[5, 6], [8, 3]]), cache=shared, new_tokens=3).shape
      (2, 3)
    """
    prompts.check_room(tokens_BL, cache, tokens_BL.shape[1])
    return _prefill(step, params, tokens_BL, mask_BL, cache, copies)


@functools.partial(jax.jit, static_argnames=("step", "copies"))
def _prefill(
    step: Step, params: Any, tokens_BL: jax.Array, mask_BL: jax.Array | None, cache: Cache, copies: int
) -> Cache:
    mask_BL = jnp.ones(tokens_BL.shape, bool) if mask_BL is None else mask_BL.astype(bool)
    _, cache = step(params, tokens_BL, mask_BL, cache)
    return cache if copies == 1 else cache.select(jnp.repeat(jnp.arange(tokens_BL.shape[0]), copies))
