"""Double quantization: the scales of blocks, quantized to eight bits about their mean."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_jax.quantization import codebooks
from lora_jax.renamed import former_members

SECOND_BLOCK = 256
"""The number of scales that share a second-level scale."""

_HUGE = 2.0**120
"""The reciprocal of a larger float32 is subnormal."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
@former_members(decoded="decode")
class Scales:
    """The scales of a weight's blocks in eight bits.

    The scales of a layer are ordered by output, all scales of an output together, and form blocks of 256.

    Attributes:
      codes: `[*layers, …]`, uint8, of the shape of the scales.
      second: `[*layers, n/256]`, float32; a scale for each block of scales.
      offset: `[*layers]`, float32; the mean of the layer's scales.
    """

    codes: jax.Array
    second: jax.Array
    offset: jax.Array

    @classmethod
    def of(cls, scales: jax.Array, layers: int, axis: int) -> "Scales":
        """Quantizes scales.

        Args:
          scales: float32, one for each block.
          layers: The number of leading axes over layers.
          axis: The axis of the scales of one output, as a negative number.
        """
        offset = _mean(scales, tuple(range(layers, scales.ndim)))
        centered = scales - offset.reshape(*offset.shape, *(1,) * (scales.ndim - layers))
        ordered = jnp.moveaxis(centered, axis, -1)
        values = ordered.reshape(*offset.shape, -1)
        number = -(-values.shape[-1] // SECOND_BLOCK)
        padding = number * SECOND_BLOCK - values.shape[-1]
        blocks = jnp.pad(values, [*((0, 0),) * layers, (0, padding)]).reshape(*offset.shape, number, SECOND_BLOCK)
        second = jnp.max(jnp.abs(blocks), axis=-1)
        codes = codebooks.nearest(normalize(blocks, second[..., None]), codebooks.dynamic_map())
        codes = codes.reshape(*offset.shape, -1)[..., : values.shape[-1]].reshape(ordered.shape)
        return cls(codes=jnp.moveaxis(codes, -1, axis), second=second, offset=offset)

    def decode(self, axis: int) -> jax.Array:
        """Returns the scales in float32; `axis` as for :meth:`of`."""
        ordered = list(self.codes.shape[self.offset.ndim :])
        ordered.append(ordered.pop(axis))
        spread = jnp.repeat(self.second, SECOND_BLOCK, axis=-1)[..., : math.prod(ordered)]
        spread = jnp.moveaxis(spread.reshape(*self.offset.shape, *ordered), -1, axis)
        values = jnp.take(codebooks.dynamic_map(), self.codes.astype(jnp.int32), mode="clip")
        return values * spread + self.offset.reshape(*self.offset.shape, *(1,) * len(ordered))


def _mean(scales: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The mean of at most 2²⁶ scales, with the same bits for every order of addition, so for any number of devices.

    The scales are written as multiples of 2⁻³⁰ of the largest, whose six-bit digits are summed as integers.
    """
    largest = jnp.max(scales, axis=axes, keepdims=True)
    steps = (scales / jnp.where(largest > 0.0, largest, 1.0) * 2.0**30).astype(jnp.uint32)
    total = jnp.zeros(largest.shape, jnp.float32)
    for shift in range(0, 36, 6):
        digits = jnp.right_shift(steps, jnp.uint32(shift)) & jnp.uint32(63)
        total += jnp.sum(digits, axis=axes, keepdims=True, dtype=jnp.uint32).astype(jnp.float32) * 2.0 ** (shift - 30)
    return jnp.squeeze(total / math.prod(scales.shape[axis] for axis in axes) * largest, axes)


def normalize(values: jax.Array, largest: jax.Array) -> jax.Array:
    """Divides values by the largest magnitude of their block; zero if that is zero."""
    # Multiplies by the reciprocal, as bitsandbytes does: its rounding decides the code of a value halfway between two
    # levels. The reciprocal of a very large float is subnormal.
    shrunk = jnp.where(largest < _HUGE, 1.0, 2.0**-64)
    safe = jnp.where(largest == 0.0, 1.0, largest * shrunk)
    return jnp.clip(values * shrunk * (1.0 / safe), -1.0, 1.0)
