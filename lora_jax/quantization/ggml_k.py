"""Formats of GGUF files in blocks of 256 weights, whose parts have scales of 6 or 8 bits of their own; read-only.

Dequantized values equal those of the `gguf` package bit for bit, compiled or not. All products are exact in float32:
a float16 scale has 11 bits, the scale of a part 6 (Q6_K: 7), and a code at most 5 (Q6_K: 5), without their signs and
powers of two. Only the difference from a minimum is rounded, so whether a compiler fuses it with a product, or
multiplies in another order, makes no difference.

ggml searches for the scales of these formats with weights for errors and leaves room for better searches. Quantizing
into them is left to it.

References:
  ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_ (blocks) and
  `ggml-quants.c <https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c>`_ (codes)
"""

import dataclasses
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quantization.ggml import GGMLFormat
from lora_jax.quantization.packing import bits, halves, part, split


class _KFormat(GGMLFormat):
    """Blocks of 256 weights in parts."""

    block = 256
    is_read_only = True

    def encode_blocks(self, values: jax.Array, axis: int) -> NoReturn:
        self.check_encodable()
        raise AssertionError


class _PartsWithMinimum(_KFormat):
    """Eight parts of 32 weights, each with a scale and a minimum of six bits."""

    halves = (0, 2)

    def _decode(self, steps: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
        """Returns the weights of codes with axes (4, 2, 32) in place of the block's."""
        scale, low = (jnp.expand_dims(halves(codes, start, axis), (axis, axis + 1)) for start in (0, 2))
        first, second, third = (part(codes, 4 + 4 * index, 4, axis) for index in range(3))
        scales = [bits(first, 0, 63, axis), (third & np.uint8(15)) | _upper(first)]
        lows = [bits(second, 0, 63, axis), jnp.right_shift(third, np.uint8(4)) | _upper(second)]
        six, six_low = (
            split(jnp.concatenate(group, axis).astype(jnp.float32), (4, 2, 1), axis) for group in (scales, lows)
        )
        return (scale * six) * steps.astype(jnp.float32) - low * six_low


def _upper(six: jax.Array) -> jax.Array:
    """The upper two bits of bytes, as bits 4 and 5."""
    return jnp.right_shift(six, np.uint8(2)) & np.uint8(48)


@dataclasses.dataclass(frozen=True)
class Q4_K(_PartsWithMinimum):
    """Four bits: the integers from 0 to 15, times a scale, minus a minimum, for 32 of 256 weights. 4.5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`. Weights are read, not quantized, in this format.

    Example:
      >>> import numpy as np
      >>> from lora_jax.quantization import from_gguf
      >>> from_gguf(np.zeros((64, 144), np.uint8), "Q4_K")
      Q4_K[256, 64](dtype=float32, block=256, 4.500 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q4_K
    """

    tensor_type = 12
    type_size = 144

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        steps = split(part(codes, 16, 128, axis), (4, 1, 32), axis)
        return self._decode(bits(steps, [[0], [4]], 15, axis + 1), codes, axis)


@dataclasses.dataclass(frozen=True)
class Q5_K(_PartsWithMinimum):
    """Five bits: the integers from 0 to 31, times a scale, minus a minimum, for 32 of 256 weights. 5.5 bits a weight.

    Takes the arguments of :class:`GGMLFormat`. Weights are read, not quantized, in this format.

    Example:
      >>> import numpy as np
      >>> from lora_jax.quantization import from_gguf
      >>> from_gguf(np.zeros((64, 176), np.uint8), "Q5_K")
      Q5_K[256, 64](dtype=float32, block=256, 5.500 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q5_K
    """

    tensor_type = 13
    type_size = 176

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        steps = split(part(codes, 48, 128, axis), (4, 1, 32), axis)
        fifths = split(part(codes, 16, 32, axis), (1, 1, 32), axis)
        fifths = jnp.left_shift(bits(fifths, np.arange(8).reshape(4, 2, 1), 1, axis), np.uint8(4))
        return self._decode(bits(steps, [[0], [4]], 15, axis + 1) | fifths, codes, axis)


@dataclasses.dataclass(frozen=True)
class Q6_K(_KFormat):
    """Six bits: the integers from -32 to 31, times a scale for 16 of 256 weights. 6.5625 bits a weight.

    Takes the arguments of :class:`GGMLFormat`. Weights are read, not quantized, in this format.

    Example:
      >>> import numpy as np
      >>> from lora_jax.quantization import from_gguf
      >>> from_gguf(np.zeros((64, 210), np.uint8), "Q6_K")
      Q6_K[256, 64](dtype=float32, block=256, 6.562 bits)

    References:
      ggml, `ggml-common.h <https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>`_, block_q6_K
    """

    tensor_type = 14
    type_size = 210
    halves = (208,)

    def decode_bytes(self, codes: jax.Array, axis: int) -> jax.Array:
        # Axes: the half of the block, then four groups of two parts, of 16 weights each.
        low = split(part(codes, 0, 128, axis), (2, 1, 2, 2, 16), axis)
        low = bits(low, np.reshape([0, 4], (2, 1, 1, 1)), 15, axis + 1)
        low = low.reshape(*low.shape[: axis + 1], 4, *low.shape[axis + 3 :])
        high = bits(
            split(part(codes, 128, 64, axis), (2, 1, 2, 16), axis), np.reshape([0, 2, 4, 6], (4, 1, 1)), 3, axis + 1
        )
        steps = (low | jnp.left_shift(high, np.uint8(4))).astype(jnp.float32) - 32.0
        scales = jax.lax.bitcast_convert_type(part(codes, 192, 16, axis), jnp.int8).astype(jnp.float32)
        scale = jnp.expand_dims(halves(codes, 208, axis), (axis, axis + 1, axis + 2))
        return (scale * split(scales, (2, 4, 2, 1), axis)) * steps
