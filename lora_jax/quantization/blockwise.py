"""Arrays to codes and scales in blocks, and back."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quantization.codec import Codec
from lora_jax.quantization.scales import SECOND_BLOCK, Scales, normalize


def code_axis(blocked: Sequence[int]) -> int:
    """Returns the axis of codes and scales that stands for the blocked axes of the weight; all are negative numbers."""
    return min(blocked) + len(blocked) - 1


def weight_count(code_bytes: int, codec: Codec) -> int:
    """Returns the number of weights, padding included, in so many bytes of codes."""
    return code_bytes * (2 if codec.bits == 4 else 1)


def block_count(size: int, codec: Codec) -> int:
    """Returns the number of blocks for so many weights; the last one may be padded."""
    return -(-size // codec.block)


def encode_blocks(
    weight: jax.Array, codec: Codec, blocked: Sequence[int], layers: int
) -> tuple[jax.Array, jax.Array | Scales]:
    """Encodes an array in blocks.

    Args:
      weight: Floats.
      codec: The code.
      blocked: The axes that blocks run along, as negative numbers, in order.
      layers: The number of leading axes that have second-level scales of their own.

    Returns:
      Codes and scales, with one axis instead of the blocked ones, in the position of the first of them.
    """
    axis, sizes = blocked[0] + weight.ndim, tuple(weight.shape[axis] for axis in blocked)
    values = jnp.moveaxis(weight.astype(jnp.float32), tuple(blocked), tuple(range(axis, axis + len(sizes))))
    lead, tail = values.shape[:axis], values.shape[axis + len(sizes) :]
    size = math.prod(sizes)
    number = block_count(size, codec)
    padding = number * codec.block - size
    values = values.reshape(*lead, size, *tail)
    if padding:
        values = jnp.pad(values, [(0, padding if i == axis else 0) for i in range(values.ndim)])
    values = values.reshape(*lead, number, codec.block, *tail)
    largest = jnp.max(jnp.abs(values), axis=axis + 1, keepdims=True)
    # XLA's maximum over some axes drops NaN. A block that contains NaN gets a NaN scale.
    largest = jnp.where(jnp.isnan(values).any(axis=axis + 1, keepdims=True), jnp.nan, largest)
    codes = codec.encode(normalize(values, largest))
    if codec.bits == 4:
        upper, lower = jnp.split(codes, 2, axis=axis + 1)
        codes = jnp.left_shift(upper, jnp.uint8(4)) | lower
    codes = codes.reshape(*lead, codes.shape[axis] * codes.shape[axis + 1], *tail)
    scales = jnp.squeeze(largest, axis + 1)
    return codes, Scales.of(scales, layers, axis - scales.ndim) if codec.double else scales


def decode_blocks(
    codes: jax.Array, scales: jax.Array, codec: Codec, blocked: Sequence[int], sizes: Sequence[int], dtype: np.dtype
) -> jax.Array:
    """Decodes an array, the inverse of :func:`encode_blocks`.

    The arithmetic on blocks is between two optimization barriers. Otherwise XLA for TPUs moves the reshapes to and from
    blocks past it and writes float32 scales for every weight; with the barriers it writes the weight only.

    Args:
      codes: uint8.
      scales: float32.
      codec: The code.
      blocked: The axes of the weight that blocks run along, as negative numbers.
      sizes: Their sizes.
      dtype: The dtype of the weight.
    """
    half = codec.block // 2
    axis = scales.ndim + code_axis(blocked)
    lead, tail = codes.shape[:axis], codes.shape[axis + 1 :]
    number = scales.shape[axis]
    inner = (1, half) if codec.bits == 4 else (codec.block,)
    codes = jax.lax.optimization_barrier(codes.reshape(*lead, number, *inner, *tail))
    if codec.bits == 4:
        shifts = jnp.asarray([4, 0], jnp.uint8).reshape(*(1,) * (axis + 1), 2, *(1,) * (1 + len(tail)))
        codes = jnp.right_shift(codes, shifts) & jnp.uint8(15)
    values = codec.decode(codes) * jnp.expand_dims(scales, [axis + 1 + i for i in range(len(inner))])
    values = jax.lax.optimization_barrier(values.astype(dtype)).reshape(*lead, number * codec.block, *tail)
    size = math.prod(sizes)
    if size != number * codec.block:
        values = jax.lax.slice_in_dim(values, 0, size, axis=axis)
    values = values.reshape(*lead, *sizes, *tail)
    return jnp.moveaxis(values, tuple(range(axis, axis + len(sizes))), tuple(i + values.ndim for i in blocked))


def check_arrays(codes: jax.Array, scales: jax.Array | Scales, codec: Codec, axis: int) -> None:
    """Raises `ValueError` unless codes and scales are those of one weight; `axis` is the blocked one."""
    parts = {"codes": codes}
    parts |= {"scales": scales.codes, "second": scales.second} if isinstance(scales, Scales) else {"scales": scales}
    dtypes = [array.dtype for array in jax.tree.leaves((codes, scales))]
    expected_dtypes = [jnp.dtype(jnp.uint8), jnp.dtype(jnp.float32)]
    if isinstance(scales, Scales):
        expected_dtypes = [expected_dtypes[0], *expected_dtypes, expected_dtypes[1]]
    if dtypes != expected_dtypes:
        raise ValueError(
            f"A quantized weight in {codec}: its arrays are {', '.join(map(str, dtypes))}; expected "
            f"{', '.join(map(str, expected_dtypes))}. Cast the weight before it is quantized."
        )
    size = weight_count(codes.shape[axis], codec)
    shape = list(codes.shape)
    shape[axis] = block_count(size, codec)
    expected = {"scales": tuple(shape)}
    if isinstance(scales, Scales):
        layers = scales.offset.shape
        inner = math.prod(scales.codes.shape[len(layers) :])
        expected["second"] = (*layers, -(-inner // SECOND_BLOCK))
    if size % codec.block or any(tuple(parts[name].shape) != shape for name, shape in expected.items()):
        raise ValueError(
            f"A quantized weight in {codec}: its arrays do not fit each other: "
            f"{', '.join(f'{name} {tuple(array.shape)}' for name, array in parts.items())}; for these codes expected "
            f"{' and '.join(f'{name} {shape}' for name, shape in expected.items())}."
        )
