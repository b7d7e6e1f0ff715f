"""Quantized weights of GGUF files, as llama.cpp serves them."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.protocol import check_axes
from lora_jax.quantization.blockwise import code_axis
from lora_jax.quantization.formats import blocked_axes
from lora_jax.quantization.ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, GGMLFormat
from lora_jax.quantization.ggml_k import Q4_K, Q5_K, Q6_K
from lora_jax.quantization.leaf import Quantized

FORMATS: dict[int, GGMLFormat] = {
    form.tensor_type: form for form in (Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), Q4_K(), Q5_K(), Q6_K())
}
"""The formats by ggml's number."""


def from_gguf(
    blocks: Any,
    tensor_type: int | str,
    axes: Sequence[str] = ("in", "out"),
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = jnp.float32,
) -> Quantized:
    """Reads a weight from the blocks of a tensor of a GGUF file; its bytes are kept, so its values are the file's.

    Args:
      blocks: `[*batch, rows, bytes per row]`, uint8: the data of a tensor as the `gguf` package reads it. The rows of a
        matrix are its outputs (of a table, its entries), and its blocks run along the inputs (along an entry).
      tensor_type: The tensor's type, `gguf.GGMLQuantizationType` or its name or number.
      axes: The role of each axis of the leaf ('batch', 'in', 'out', 'lookup'): `("in", "out")` makes a kernel,
        `("out", "in")` a matrix as PyTorch has it, `("lookup", "out")` a table, `("batch", "in", "out")` the kernels
        of experts.
      shape: The shape of the leaf, if several axes stand for the rows or for a row. Left out, the leaf has an axis for
        each of the tensor.
      dtype: The dtype of the leaf's values.

    Returns:
      The leaf. Leaves of equal shapes and formats are stacked by `jax.tree.map(lambda *x: jnp.stack(x), *leaves)`.

    Raises:
      ValueError: The type is not supported; the blocks do not fit the type, the roles or the shape; a scale is not
        finite.

    Example:
      >>> import numpy as np
      >>> from_gguf(np.zeros((64, 80), np.uint8), "Q4_1")
      Q4_1[128, 64](dtype=float32, block=32, 5.000 bits)
      >>> from_gguf(np.zeros((64, 80), np.uint8), "Q4_1", ("in", "out", "out"), shape=(128, 4, 16)).shape
      (128, 4, 16)

    References:
      `The GGUF file format <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_
    """
    form = _format(tensor_type)
    blocks = np.asarray(blocks)
    if blocks.dtype != np.uint8 or blocks.ndim < 2 or blocks.shape[-1] % form.type_size or not blocks.size:
        raise ValueError(
            f"{form.name} tensor of shape {blocks.shape} and dtype {blocks.dtype}; expected uint8[*batch, rows, bytes "
            f"per row], in which a row is blocks of {form.type_size} bytes."
        )
    columns = blocks.shape[-1] // form.type_size * form.block
    stored_shape = (*blocks.shape[:-1], columns)
    check_axes(axes, stored_shape if shape is None else shape)
    blocked, _ = blocked_axes(axes)
    rest = [axis for axis in range(-len(axes), 0) if axis not in blocked]
    stored = sorted(rest, key=lambda axis: axes[axis] != "batch")  # in the file, batch axes lead
    if shape is None:
        if len(blocked) != 1:
            raise ValueError(
                f"{form.name} tensor of shape {stored_shape} with the roles {tuple(axes)}: expected one axis 'in' "
                "('out' of a table), along which blocks run; for several pass shape=."
            )
        sizes = dict(zip([*stored, *blocked], stored_shape))
        shape = [sizes[axis] for axis in sorted(sizes)]
    inner = math.prod(shape[axis] for axis in blocked)
    if not blocked or inner != columns or math.prod(shape) != columns * math.prod(blocks.shape[:-1]):
        raise ValueError(
            f"{form.name} tensor of shape {stored_shape}: a leaf of shape {tuple(shape)} with the "
            f"roles {tuple(axes)} has {math.prod(shape) // max(inner, 1)} rows of {inner} weights."
        )
    scales = blocks.reshape(-1, form.type_size)[:, [start + 1 for start in form.halves]]
    if (damaged := (scales & 0x7C == 0x7C).any(axis=1)).any():
        raise ValueError(
            f"{form.name} tensor of shape {stored_shape}: {damaged.sum()} of {damaged.size} blocks "
            f"have a scale that is not finite; the first is block {damaged.argmax()}."
        )
    codes = blocks.reshape(*(shape[axis] for axis in stored), blocks.shape[-1])
    order = [stored.index(axis) for axis in rest]
    order.insert(len(rest) + 1 + code_axis(blocked), len(rest))
    return Quantized(
        codes=jnp.array(codes.transpose(order)),
        scales=None,
        format=form,
        blocked=blocked,
        sizes=tuple(shape[axis] for axis in blocked),
        dtype=np.dtype(dtype),
    )


def _format(tensor_type: int | str) -> GGMLFormat:
    """Returns the format of a tensor type."""
    by_name = {form.name: form for form in FORMATS.values()}
    form = by_name.get(tensor_type) if isinstance(tensor_type, str) else FORMATS.get(tensor_type)
    if form is None:
        name = getattr(tensor_type, "name", tensor_type)
        raise ValueError(f"Tensor type {name!r}; expected one of {', '.join(by_name)}, or their numbers in ggml.")
    return form
