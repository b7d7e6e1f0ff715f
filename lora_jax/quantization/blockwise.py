"""Arrays to codes and scales in blocks, and back."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quantization.codec import Codec
from lora_jax.quantization.scales import SECOND_BLOCK, Scales


def code_axis(blocked: Sequence[int]) -> int:
    """Returns the axis of codes and scales that stands for the blocked axes of the weight; all are negative numbers."""
    return min(blocked) + len(blocked) - 1


def weight_count(code_bytes: int, codec: Codec) -> int:
    """Returns the number of weights, padding included, in so many bytes of codes."""
    return code_bytes // codec.block_bytes * codec.block


def block_count(size: int, codec: Codec) -> int:
    """Returns the number of blocks for so many weights; the last one may be padded."""
    return -(-size // codec.block)


def encode_blocks(
    weight: jax.Array, codec: Codec, blocked: Sequence[int], layers: int
) -> tuple[jax.Array, jax.Array | Scales | None]:
    """Encodes an array in blocks.

    Args:
      weight: Floats.
      codec: The code.
      blocked: The axes that blocks run along, as negative numbers, in order.
      layers: The number of leading axes that have second-level scales of their own.

    Returns:
      Codes and scales (None if the codes contain them), with one axis instead of the blocked ones, in the position of
      the first of them.
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
    codes, scales = codec.encode_blocks(values, axis + 1)
    codes = codes.reshape(*lead, number * codec.block_bytes, *tail)
    if scales is None or not codec.double:
        return codes, scales
    return codes, Scales.of(scales, layers, axis - scales.ndim)


def decode_blocks(
    codes: jax.Array,
    scales: jax.Array | None,
    codec: Codec,
    blocked: Sequence[int],
    sizes: Sequence[int],
    dtype: np.dtype,
) -> jax.Array:
    """Decodes an array, the inverse of :func:`encode_blocks`.

    The arithmetic on blocks is between two optimization barriers. Otherwise XLA for TPUs moves the reshapes to and from
    blocks past it and writes float32 scales for every weight; with the barriers it writes the weight only.

    Args:
      codes: uint8.
      scales: float32, or None if the codes contain them.
      codec: The code.
      blocked: The axes of the weight that blocks run along, as negative numbers.
      sizes: Their sizes.
      dtype: The dtype of the weight.
    """
    axis = codes.ndim + code_axis(blocked)
    lead, tail = codes.shape[:axis], codes.shape[axis + 1 :]
    number = codes.shape[axis] // codec.block_bytes
    codes = jax.lax.optimization_barrier(codes.reshape(*lead, number, codec.block_bytes, *tail))
    values = codec.decode_blocks(codes, scales, axis + 1).astype(dtype)
    values = jax.lax.optimization_barrier(values).reshape(*lead, number * codec.block, *tail)
    size = math.prod(sizes)
    if size != number * codec.block:
        values = jax.lax.slice_in_dim(values, 0, size, axis=axis)
    values = values.reshape(*lead, *sizes, *tail)
    return jnp.moveaxis(values, tuple(range(axis, axis + len(sizes))), tuple(i + values.ndim for i in blocked))


def check_arrays(codes: jax.Array, scales: jax.Array | Scales | None, codec: Codec, axis: int) -> None:
    """Raises `ValueError` unless codes and scales are those of one weight; `axis` is the blocked one."""
    parts, floats = {"codes": codes}, {"scales"}
    if isinstance(scales, Scales):
        parts |= {"scales": scales.codes, "second": scales.second, "offset": scales.offset}
        floats = {"second", "offset"}
    elif scales is not None:
        parts["scales"] = scales
    dtypes = [array.dtype for array in parts.values()]
    expected_dtypes = [jnp.dtype(jnp.float32 if name in floats else jnp.uint8) for name in parts]
    if dtypes != expected_dtypes:
        raise ValueError(
            f"A quantized weight in {codec}: its arrays are {', '.join(map(str, dtypes))}; expected "
            f"{', '.join(map(str, expected_dtypes))}. Cast the weight before it is quantized."
        )
    shape = list(codes.shape)
    shape[axis] = number = -(-codes.shape[axis] // codec.block_bytes)
    expected = {"scales": tuple(shape)} if "scales" in parts else {}
    if isinstance(scales, Scales):
        layers = scales.offset.shape
        inner = math.prod(scales.codes.shape[len(layers) :])
        expected["second"] = (*layers, -(-inner // SECOND_BLOCK))
    shape[axis] = number * codec.block_bytes
    expected["codes"] = tuple(shape)
    if any(tuple(parts[name].shape) != shape for name, shape in expected.items()):
        raise ValueError(
            f"A quantized weight in {codec}: its arrays do not fit each other: "
            f"{', '.join(f'{name} {tuple(array.shape)}' for name, array in parts.items())}; expected "
            f"{' and '.join(f'{name} {shape}' for name, shape in expected.items())}."
        )
