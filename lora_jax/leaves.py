"""What a leaf of a base may be: an array, or a pytree node that stands for one (a quantized weight)."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_quantized(node: Any) -> bool:
    """Whether a node of a base stands for an array, which its `dequantize()` computes. It has `shape` and `dtype`."""
    return hasattr(type(node), "dequantize")  # of the type: a box passes on what its value has


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced as an array, or stands for one; everything else is closed over."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or is_quantized(leaf)


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf has a shape and no values."""
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(leaf))


def dequantized(leaf: Any) -> Any:
    """The array that a leaf stands for: itself, unless it is quantized."""
    return leaf.dequantize() if is_quantized(leaf) else leaf


def apply_dequantized(function: Callable[..., jax.Array], leaf: Any, *operands: Any) -> jax.Array:
    """Computes `function(weight, *operands)` of a quantized leaf's weight, of which the backward pass keeps the codes.

    A leaf with a method `apply_dequantized(function, *operands)` computes it itself.
    """
    if hasattr(leaf, "apply_dequantized"):
        return leaf.apply_dequantized(function, *operands)
    return jax.checkpoint(lambda leaf, *operands: function(leaf.dequantize(), *operands))(leaf, *operands)


def canonical(leaf: Any) -> Any:
    """A NumPy array in the dtype that JAX computes with (float32 for float64, unless x64 is enabled); others as is.

    JAX converts arguments silently, but warns where code asks for the dtype of such an array.
    """
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return leaf if dtype == leaf.dtype else leaf.astype(dtype)


_SHORT_NAMES = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i", "complex": "c"}


def align_leading(array: Any, ndim: int) -> Any:
    """An array with axes of size 1 appended, so that it broadcasts along the leading ones of `ndim` axes.

    Example:
      >>> align_leading(np.ones((2, 3)), 4).shape
      (2, 3, 1, 1)
    """
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def short(leaf: Any) -> str:
    """A leaf in a few characters: `f32[8,64]` for an array of any kind, else its own representation, cut."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        text = repr(leaf)
        return text if len(text) <= 40 else f"{text[:37]}..."
    name = str(leaf.dtype)
    for long, brief in _SHORT_NAMES.items():
        if name.startswith(long):
            name = brief + name.removeprefix(long)
            break
    return f"{name}[{','.join(map(str, leaf.shape))}]"


class _Text(str):
    """A string that represents itself without quotes."""

    __repr__ = str.__str__


def shapes(tree: Any) -> str:
    """A tree's representation with the dtype and shape of each array in place of its values."""
    return repr(jax.tree.map(lambda leaf: _Text(short(leaf)), tree))
