"""Leaves of a base: arrays, and pytree nodes that represent an array (quantized weights)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_quantized(node: Any) -> bool:
    """Whether a node of a base represents an array, which its `dequantize()` computes. It has `shape` and `dtype`."""
    return hasattr(type(node), "dequantize")  # a box has the attributes of its value, but not its type


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or represents one. Such leaves are traced; all others are closed over."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or is_quantized(leaf)


def is_abstract(leaf: Any) -> bool:
    """Whether a leaf has a shape but no values."""
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(leaf))


def dequantized(leaf: Any) -> Any:
    """Returns the array that a leaf represents: the leaf itself, or the dequantized weight."""
    return leaf.dequantize() if is_quantized(leaf) else leaf


def apply_dequantized(function: Callable[..., jax.Array], leaf: Any, *operands: Any) -> jax.Array:
    """Computes `function(weight, *operands)` of the weight of a quantized leaf; only the codes are residuals.

    Calls the method `apply_dequantized(function, *operands)` of the leaf if it has one.
    """
    if hasattr(leaf, "apply_dequantized"):
        return leaf.apply_dequantized(function, *operands)
    return jax.checkpoint(lambda leaf, *operands: function(leaf.dequantize(), *operands))(leaf, *operands)


def canonical(leaf: Any) -> Any:
    """Casts a NumPy array to the dtype that JAX computes with (float64 to float32 unless x64 is enabled).

    JAX casts arguments silently, but warns if code requests the dtype of such an array. Other leaves are unchanged.
    """
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return leaf if dtype == leaf.dtype else leaf.astype(dtype)


def is_finite(leaf: Any) -> bool:
    """Whether all floats of a leaf, or of the arrays of a quantized leaf, are finite; true while tracing."""
    floats = [array for array in jax.tree.leaves(leaf) if jnp.issubdtype(array.dtype, jnp.inexact)]
    checks = [jnp.isfinite(array).all() for array in floats]
    return all(isinstance(check, jax.core.Tracer) or bool(check) for check in checks)


_SHORT_NAMES = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i", "complex": "c"}


def align_leading(array: Any, ndim: int) -> Any:
    """An array with axes of size 1 appended, so that it broadcasts along the leading ones of `ndim` axes.

    Example:
      >>> align_leading(np.ones((2, 3)), 4).shape
      (2, 3, 1, 1)
    """
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def short(leaf: Any) -> str:
    """Describes a leaf briefly: `f32[8,64]` for an array of any kind, otherwise its truncated representation."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        text = repr(leaf)
        return text if len(text) <= 40 else f"{text[:37]}..."
    name = str(leaf.dtype)
    for prefix, abbreviation in _SHORT_NAMES.items():
        if name.startswith(prefix):
            name = abbreviation + name.removeprefix(prefix)
            break
    return f"{name}[{','.join(map(str, leaf.shape))}]"


class _Text(str):
    """A string whose representation has no quotes."""

    __repr__ = str.__str__


def shapes(tree: Any) -> str:
    """Returns the representation of a tree, with dtypes and shapes in place of arrays."""
    return repr(jax.tree.map(lambda leaf: _Text(short(leaf)), tree))
