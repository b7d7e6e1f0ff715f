"""Pytrees in which some leaves have a mapped axis, given by a prefix tree as `jax.vmap` accepts it in `in_axes`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def map_with_axes(function: Callable[[Any, int], Any], axes: Any, tree: Any) -> Any:
    """Applies `function(leaf, axis)` to every leaf that has a mapped axis; `axes` is a prefix of the tree."""

    def map_subtree(axis, subtree):
        return subtree if axis is None else jax.tree.map(lambda leaf: function(leaf, axis), subtree)

    axes = tuple(axes) if isinstance(tree, tuple) and isinstance(axes, list) else axes
    return jax.tree.map(map_subtree, axes, tree, is_leaf=lambda node: node is None)


def check_sizes(size: int, axes: Any, tree: Any, message: str) -> None:
    """Raises `ValueError` if a mapped axis has another size, which replaces `{}` in the message."""

    def check(leaf, axis):
        for actual in np.shape(leaf)[axis:][:1]:
            if actual != size:
                raise ValueError(message.format(actual))

    map_with_axes(check, axes, tree)
