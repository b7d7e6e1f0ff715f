"""What a leaf of a base may be: an array, or a pytree node that stands for one (a quantised weight)."""

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
    """The array that a leaf stands for: itself, unless it is quantised."""
    return leaf.dequantize() if is_quantized(leaf) else leaf
