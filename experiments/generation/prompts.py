"""Batches of prompts with different lengths."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def align(tokens_BL: jax.Array, mask_BL: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Moves each prompt to the right end of its row, so that all continue at the same position.

    Args:
      tokens_BL: Prompts with padding on either side.
      mask_BL: True at tokens. None: no padding.

    Returns:
      The tokens and their mask, with padding on the left.
    """
    if mask_BL is None:
        return tokens_BL, jnp.ones(tokens_BL.shape, bool)
    mask_BL = mask_BL.astype(bool)
    length = tokens_BL.shape[1]
    padding_B1 = jnp.argmax(mask_BL[:, ::-1], axis=1, keepdims=True)  # positions after the last token
    source_BL = (jnp.arange(length)[None] - padding_B1) % length
    return jnp.take_along_axis(tokens_BL, source_BL, axis=1), jnp.take_along_axis(mask_BL, source_BL, axis=1)


def check(tokens_BL: jax.Array, new_tokens: int, cache: Any) -> None:
    """Raises a ValueError if the cache is in use or too small for the prompts and new tokens."""
    batch, length = tokens_BL.shape
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}, expected at least 1.")
    # The last new token is never read.
    rows, slots = cache.positions_BT.shape
    if not cache.fresh or rows != batch or slots < length + new_tokens - 1:
        state = "empty" if cache.fresh else "in use"
        raise ValueError(
            f"The cache has {rows} rows and {slots} slots and is {state}; expected an empty one with {batch} rows and "
            f"{length + new_tokens - 1} slots: {length} tokens of a prompt, all but the last of {new_tokens} new ones."
        )


def ends(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns the tokens that end a text as a tuple."""
    return () if eos is None else tuple(np.atleast_1d(eos).tolist())


def is_end(tokens: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Whether each token ends its text."""
    return jnp.isin(tokens, jnp.asarray(eos, tokens.dtype)) if eos else jnp.zeros(tokens.shape, bool)
