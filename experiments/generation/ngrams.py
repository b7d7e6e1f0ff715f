"""Prevents repeated n-grams."""

import jax
import jax.numpy as jnp


def forbid_repeats(scores_BV: jax.Array, texts_BT: jax.Array, begins_B: jax.Array, length: jax.Array | int, size: int):
    """Sets the scores of tokens that would repeat an n-gram of the text to -∞.

    Args:
      scores_BV: Scores of the next tokens.
      texts_BT: Texts, which end before position `length`. Later positions are ignored.
      begins_B: The first position of each text.
      length: The end of the texts.
      size: The size n of the n-grams, static; 0 allows all.

    Returns:
      The scores.

    Example:
      >>> text = jnp.array([[3, 1, 2, 3, 1]])
      >>> forbid_repeats(jnp.zeros((1, 4)), text, jnp.array([0]), 5, 2).tolist()  # 1 was followed by 2
      [[0.0, 0.0, -inf, 0.0]]
    """
    rows, positions = texts_BT.shape
    if not 0 < size <= positions:
        return scores_BV
    windows = positions - size + 1  # window i is the n-gram at positions i … i + size - 1
    # A text shorter than n has no n-gram: whatever a clamped slice reads, no window is in range.
    suffix_BN = jax.lax.dynamic_slice_in_dim(texts_BT, length - size + 1, size - 1, axis=1)
    starts_1W = jnp.arange(windows)[None]
    same_BW = (starts_1W >= begins_B[:, None]) & (starts_1W + size <= length)
    for offset in range(size - 1):
        same_BW &= texts_BT[:, offset : offset + windows] == suffix_BN[:, offset][:, None]
    last_BW = texts_BT[:, size - 1 :]
    forbidden_BV = jnp.zeros(scores_BV.shape, bool).at[jnp.arange(rows)[:, None], last_BW].max(same_BW)
    return jnp.where(forbidden_BV, -jnp.inf, scores_BV)
