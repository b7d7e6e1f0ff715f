"""Batches of prompts with different lengths."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.cache import Cache


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


def check(tokens_BL: jax.Array, new_tokens: int, cache: Cache, no_repeat: int = 0) -> None:
    """Raises a ValueError if prompts and new tokens do not fit the cache."""
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}, expected at least 1.")
    if no_repeat and not cache.fresh:
        raise ValueError(
            f"no_repeat={no_repeat} compares with all tokens of a text, but the cache holds only keys and values of "
            "the first ones; pass an empty cache and whole prompts."
        )
    # The last new token is never read.
    check_room(tokens_BL, cache, tokens_BL.shape[1] + new_tokens - 1)


def check_room(tokens_BL: jax.Array, cache: Cache, needed: int) -> None:
    """Raises a ValueError if a cache has other rows than the tokens, or fewer than `needed` free slots.

    Within a compiled function the number of used slots is unknown: all count as free.
    """
    batch, length = tokens_BL.shape
    rows, slots = cache.positions_BT.shape
    used = 0 if cache.fresh or isinstance(cache.used, jax.core.Tracer) else int(cache.used)
    if not length:
        raise ValueError("The prompts have no tokens, expected at least one per row: its logits give the next token.")
    if rows != batch or slots < used + needed:
        new = f", all but the last of {needed - length + 1} new ones" if needed > length else ""
        raise ValueError(
            f"The cache has {rows} rows and {slots} slots, {used} of them used; expected {batch} rows and "
            f"{used + needed} slots: {f'{used} used ones, ' if used else ''}{length} tokens of a prompt{new}."
        )


def ends(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """Returns the tokens that end a text as a tuple."""
    return () if eos is None else tuple(np.atleast_1d(eos).tolist())


def is_end(tokens: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Whether each token ends its text."""
    return jnp.isin(tokens, jnp.asarray(eos, tokens.dtype)) if eos else jnp.zeros(tokens.shape, bool)
