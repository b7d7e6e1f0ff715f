"""The numbers in [-1, 1] that codes stand for, the search for the nearest one, and the lookup.

The values are those of bitsandbytes. Its NF4 table differs from equation 4 of the QLoRA paper: its outermost quantile
is 1 − (1/30 + 1/32)/2. The values are literals so that they do not depend on a platform's rounding.

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
    """Eight bits: a sign, a decimal exponent of variable length, and a fraction in the remaining bits; also 0 and 1.

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
    """Equal steps from both ends to the middle, each point rounded to float32 once, as in torch."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    number = np.arange(count)
    rising, falling = np.float64(first) + step * number, np.float64(last) - step * number[::-1]
    return np.where(number < count // 2, rising, falling).astype(np.float32)


def nearest(values: jax.Array, levels: Sequence[float] | np.ndarray) -> jax.Array:
    """Returns the code of the level nearest to each value; halfway between two levels, that of the lower one.

    Args:
      values: Floats.
      levels: Indexed by code, in any order; at most 256.

    Returns:
      Codes, uint8.
    """
    table = np.asarray(levels, np.float32)
    order = np.argsort(table, kind="stable")
    bounds = (table[order][:-1] + table[order][1:]) / np.float32(2)
    if len(bounds) <= 16:
        # XLA fuses comparisons with the computation of the values, but not a search.
        rank = sum(((values > bound).astype(jnp.uint8) for bound in bounds), jnp.zeros(values.shape, jnp.uint8))
    else:
        rank = jnp.searchsorted(jnp.asarray(bounds), values, side="left").astype(jnp.uint8)
    if (order == np.arange(len(order))).all():
        return rank
    return jnp.take(jnp.asarray(order, jnp.uint8), rank.astype(jnp.int32), mode="clip")


def lookup(codes: jax.Array, levels: Sequence[float]) -> jax.Array:
    """Returns the level of each four-bit code, float32.

    A tree of selections, which XLA fuses with its consumer on every platform; a gather would not be fused.
    """
    values = [jax.lax.full(codes.shape, level, jnp.float32) for level in levels]
    for bit in range(4):
        is_set = (codes & jnp.uint8(1 << bit)) != 0
        values = [jax.lax.select(is_set, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]
