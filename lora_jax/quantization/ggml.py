"""Formats of GGUF files in blocks of 32 weights. The bytes of a block, its scale among them, are those of the file.

Dequantized values equal those of the `gguf` package bit for bit, compiled or not. A scale is a float16, of 11 bits, and
a code an integer of at most 8 bits, so their product is exact in float32, and only the sum with a minimum is rounded.
Whether a compiler fuses product and sum makes no difference.

Encoded bytes equal those of the `gguf` package too, which rounds after each operation. A compiler would replace the
division by a constant by a product and 1 / (a / b) by b / a, so every divisor is chosen by a `where`; and it would fuse
a product and a sum, so a `clip` that changes nothing stands between them. (XLA for CPUs drops optimization barriers and
`reduce_precision` before it fuses.)

References:
  ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_ (blocks) and
  `ggml-quants.c <https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c>`_ (rounding)
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quantization.formats import Format
from lora_jax.quantization.packing import bits, half_bytes, halves, integers, pack_bits, part

_HALF_MAX = 65504.0
"""The largest float16."""


@dataclasses.dataclass(frozen=True)
class GGMLFormat(Format):
    """Blocks along a weight's contracted axes, which hold codes and scales as ggml stores them.

    Args:
      axes: The role of each axis of the weight ('batch', 'in', 'out', 'lookup'), overriding the roles found by
        tracing; None uses those.

    Attributes:
      tensor_type: ggml's number for the format.
      type_size: The number of bytes in a block.
      halves: The positions in a block of its float16 numbers.
    """

    tensor_type: ClassVar[int]
    type_size: ClassVar[int]
    halves: ClassVar[tuple[int, ...]]

    @property
    def block_bytes(self) -> int:
        return self.type_size

    @abc.abstractmethod
    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        """Decodes blocks, as :meth:`decode_blocks` does."""

    def decode_blocks(self, codes: jax.Array, scales: jax.Array | None, axis: int) -> jax.Array:
        assert scales is None
        return self.decode_bytes(codes, axis)


class _Nibbles(GGMLFormat):
    """The lower four bits of weights j and j + 16 in byte j, after four bytes with the fifth bits of all, if any."""

    block = 32
    bits: ClassVar[int]

    def _unpack(self, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the codes, float32, with axes of size 2 and 16 in place of the block's."""
        start = self.type_size - 16
        codes_low = bits(jnp.expand_dims(part(codes, start, 16, axis), axis), [[0], [4]], 15, axis)
        if self.bits == 4:
            return codes_low.astype(jnp.float32)
        fifths = jnp.expand_dims(integers(codes, start - 4, jnp.uint32, axis), axis)
        fifths = bits(fifths, np.arange(32).reshape(2, 16), 1, axis).astype(jnp.uint8)
        return (codes_low | jnp.left_shift(fifths, np.uint8(4))).astype(jnp.float32)

    def _pack(self, codes: jax.Array, axis: int) -> list[jax.Array]:
        """Returns the bytes of codes, which are floats and may exceed the largest code by one."""
        codes = jnp.minimum(codes, 2.0**self.bits - 1.0).astype(jnp.uint8)
        low, high = jnp.split(codes, 2, axis)
        packed = [(low & np.uint8(15)) | jnp.left_shift(high, np.uint8(4))]
        if self.bits == 4:
            return packed
        return [pack_bits(jnp.right_shift(codes, np.uint8(4)), axis), *packed]


class _Centered(_Nibbles):
    """A code c stands for scale · (c − offset), where the offset is half the number of codes."""

    halves = (0,)

    def encode_blocks(self, values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array | None]:
        offset = 2.0 ** (self.bits - 1)
        magnitudes = jnp.abs(values)
        first = jnp.argmax(magnitudes, axis, keepdims=True)
        scale = jnp.take_along_axis(values, first, axis) / -offset
        steps = jnp.clip(values * _inverse(scale), -2.0 * offset, 2.0 * offset)
        return jnp.concatenate([half_bytes(scale, axis), *self._pack(steps + (offset + 0.5), axis)], axis), None

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        scale = jnp.expand_dims(halves(codes, 0, axis), axis)
        return (self._unpack(codes, axis) - 2.0 ** (self.bits - 1)) * scale


class _Affine(_Nibbles):
    """A code c stands for scale · c + minimum."""

    halves = (0, 2)

    def encode_blocks(self, values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array | None]:
        largest = 2.0**self.bits - 1.0
        low, high = (function(values, axis, keepdims=True) for function in (jnp.min, jnp.max))
        scale = (high - low) / jnp.where(high > low, largest, 1.0)
        steps = jnp.clip((values - low) * _inverse(scale), 0.0, 2.0 * largest)
        parts = half_bytes(scale, axis), half_bytes(low, axis), *self._pack(steps + 0.5, axis)
        return jnp.concatenate(parts, axis), None

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        scale, low = (jnp.expand_dims(halves(codes, start, axis), axis) for start in (0, 2))
        return self._unpack(codes, axis) * scale + low


def _inverse(scale: jax.Array) -> jax.Array:
    is_zero = scale == 0.0
    return jnp.where(is_zero, 0.0, 1.0 / jnp.where(is_zero, 1.0, scale))


@dataclasses.dataclass(frozen=True)
class Q8_0(GGMLFormat):
    """Eight bits: the integers from -127 to 127, times a scale for 32 weights. 8.5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> lora.quantize(base, {"w": Q8_0(axes=("in", "out"))})["w"]
      Q8_0[128, 64](dtype=float32, block=32, 8.500 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q8_0
    """

    tensor_type = 8
    block = 32
    type_size = 34
    halves = (0,)
    largest = 127 * _HALF_MAX

    def encode_blocks(self, values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array | None]:
        largest = jnp.max(jnp.abs(values), axis, keepdims=True)
        scale = largest / jnp.where(largest > 0.0, 127.0, 1.0)
        steps = jnp.clip(values * _inverse(scale), -128.0, 127.0)
        whole = jnp.floor(jnp.abs(steps))
        magnitudes = whole + jnp.floor(2.0 * (jnp.abs(steps) - whole))
        codes = jax.lax.bitcast_convert_type((jnp.sign(steps) * magnitudes).astype(jnp.int8), jnp.uint8)
        return jnp.concatenate([half_bytes(scale, axis), codes], axis), None

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        steps = jax.lax.bitcast_convert_type(part(codes, 2, 32, axis), jnp.int8)
        return steps.astype(jnp.float32) * halves(codes, 0, axis)


@dataclasses.dataclass(frozen=True)
class Q4_0(_Centered):
    """Four bits: the integers from -8 to 7, times a scale for 32 weights. 4.5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> lora.quantize(base, {"w": Q4_0(axes=("in", "out"))})["w"]
      Q4_0[128, 64](dtype=float32, block=32, 4.500 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q4_0
    """

    tensor_type = 2
    type_size = 18
    bits = 4
    largest = 8 * _HALF_MAX


@dataclasses.dataclass(frozen=True)
class Q4_1(_Affine):
    """Four bits: the integers from 0 to 15, times a scale, plus a minimum, for 32 weights. 5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> lora.quantize(base, {"w": Q4_1(axes=("in", "out"))})["w"]
      Q4_1[128, 64](dtype=float32, block=32, 5.000 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q4_1
    """

    tensor_type = 3
    type_size = 20
    bits = 4
    largest = _HALF_MAX


@dataclasses.dataclass(frozen=True)
class Q5_0(_Centered):
    """Five bits: the integers from -16 to 15, times a scale for 32 weights. 5.5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> lora.quantize(base, {"w": Q5_0(axes=("in", "out"))})["w"]
      Q5_0[128, 64](dtype=float32, block=32, 5.500 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q5_0
    """

    tensor_type = 6
    type_size = 22
    bits = 5
    largest = 16 * _HALF_MAX


@dataclasses.dataclass(frozen=True)
class Q5_1(_Affine):
    """Five bits: the integers from 0 to 31, times a scale, plus a minimum, for 32 weights. 6 bits a weight.

    Takes the arguments of :class:`GGMLFormat`.

    Example:
      >>> import jax, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> lora.quantize(base, {"w": Q5_1(axes=("in", "out"))})["w"]
      Q5_1[128, 64](dtype=float32, block=32, 6.000 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q5_1
    """

    tensor_type = 7
    type_size = 24
    bits = 5
    largest = _HALF_MAX
