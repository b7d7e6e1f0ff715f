"""The bytes of blocks: parts of them, the bits in them, and numbers of several bytes, the lowest byte first.

`axis` is the position of the bytes of a block, counted from the first axis; other axes may follow.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def part(codes: jax.Array, start: int, size: int, axis: int) -> jax.Array:
    """Returns `size` bytes of each block."""
    return jax.lax.slice_in_dim(codes, start, start + size, axis=axis)


def split(array: jax.Array, sizes: Sequence[int], axis: int) -> jax.Array:
    """Splits an axis into several, the slowest first."""
    assert math.prod(sizes) == array.shape[axis]
    return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])


def bits(array: jax.Array, shifts: Any, mask: int, axis: int) -> jax.Array:
    """Returns `array >> shifts & mask`; the shifts are an array that broadcasts against the axes from `axis` on."""
    return jnp.right_shift(array, _aligned(shifts, array, axis)) & np.asarray(mask, array.dtype)


def pack_bits(array: jax.Array, axis: int) -> jax.Array:
    """Returns the bytes of bits, which are 0 or 1, the lowest bit first."""
    array = split(array, (array.shape[axis] // 8, 8), axis)
    return jnp.sum(jnp.left_shift(array, _aligned(np.arange(8), array, axis + 1)), axis + 1, dtype=array.dtype)


def _aligned(constant: Any, array: jax.Array, axis: int) -> np.ndarray:
    """A constant of the array's dtype and number of axes; its own axes are those from `axis` on."""
    constant = np.asarray(constant, array.dtype)
    return constant.reshape(*(1,) * axis, *constant.shape, *(1,) * (array.ndim - axis - constant.ndim))


def integers(codes: jax.Array, start: int, dtype: Any, axis: int) -> jax.Array:
    """Returns an unsigned number of each block, along an axis of size 1."""
    total = jnp.zeros((), dtype)
    for position in range(np.dtype(dtype).itemsize):
        byte = part(codes, start + position, 1, axis).astype(dtype)
        total = total | jnp.left_shift(byte, np.asarray(8 * position, dtype))
    return total


def halves(codes: jax.Array, start: int, axis: int) -> jax.Array:
    """Returns a float16 of each block as float32, along an axis of size 1."""
    integer = integers(codes, start, jnp.uint16, axis)
    return jax.lax.bitcast_convert_type(integer, jnp.float16).astype(jnp.float32)


def half_bytes(values: jax.Array, axis: int) -> jax.Array:
    """Returns the two bytes of numbers rounded to float16; `axis`, along which there is one number, has two bytes."""
    integer = jax.lax.bitcast_convert_type(values.astype(jnp.float16), jnp.uint16)
    return jnp.concatenate([integer.astype(jnp.uint8), (integer >> np.uint16(8)).astype(jnp.uint8)], axis)
