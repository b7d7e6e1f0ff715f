"""The numbers in [-1, 1] that codes stand for, and how they are found and looked up.

The values are those of bitsandbytes, whose NF4 table differs from what the QLoRA paper's equation 4 gives: its
outermost quantile is 1 − (1/30 + 1/32)/2. They are written out, so that no platform rounds them otherwise.

References:
  Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3 and appendix E
  Dettmers, `8-bit approximations for parallelism in deep learning <https://arxiv.org/abs/1511.04561>`_, 2015
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# fmt: off
NORMAL_FLOAT = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""Quantiles of a normal distribution, with an exact zero."""
# fmt: on

_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FLOAT = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))
"""A sign, two bits of exponent and one of fraction."""


def dynamic_map() -> np.ndarray:
    """Eight bits: a sign, an exponent of ten of varying length, and a fraction in the bits that it leaves; 0 and 1.

    Returns:
      `[256]`, float32, ascending.
    """
    values = [np.float32(0.0), np.float32(1.0)]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        magnitudes = np.float32(10.0 ** (exponent - 6)) * middles
        values += [*magnitudes, *-magnitudes]
    return np.sort(np.asarray(values, np.float32))


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Equal steps from both ends to the middle, each point rounded to float32 once, as torch has them."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    number = np.arange(count)
    rising, falling = np.float64(first) + step * number, np.float64(last) - step * number[::-1]
    return np.where(number < count // 2, rising, falling).astype(np.float32)


def nearest(values: jax.Array, levels: Sequence[float] | np.ndarray) -> jax.Array:
    """The code of the level nearest to each value; in the middle between two, the lower level's.

    Args:
      values: Floats.
      levels: By code, in any order; at most 256.

    Returns:
      Codes, uint8.
    """
    table = np.asarray(levels, np.float32)
    order = np.argsort(table, kind="stable")
    bounds = (table[order][:-1] + table[order][1:]) / np.float32(2)
    if len(bounds) <= 16:
        # Comparisons are fused with what makes the values; a search is not.
        place = sum(((values > bound).astype(jnp.uint8) for bound in bounds), jnp.zeros(values.shape, jnp.uint8))
    else:
        place = jnp.searchsorted(jnp.asarray(bounds), values, side="left").astype(jnp.uint8)
    if (order == np.arange(len(order))).all():
        return place
    return jnp.take(jnp.asarray(order, jnp.uint8), place.astype(jnp.int32), mode="clip")


def chosen(codes: jax.Array, levels: Sequence[float]) -> jax.Array:
    """The level of each four-bit code, float32.

    A tree of selections, which XLA fuses with what follows on every platform; a gather would be a pass of its own.
    """
    values = [jax.lax.full(codes.shape, level, jnp.float32) for level in levels]
    for bit in range(4):
        is_set = (codes & jnp.uint8(1 << bit)) != 0
        values = [jax.lax.select(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
