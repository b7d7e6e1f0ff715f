"""Pytrees in which some leaves have a mapped axis, given by a prefix tree as `jax.vmap` accepts it in `in_axes`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax.leaves import is_array


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


def split_arrays(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the tree with None in place of leaves that are not arrays, and a function that restores these."""
    leaves, treedef = jax.tree.flatten(tree)

    def restore(arrays: Any) -> Any:
        queue = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(treedef, [next(queue) if is_array(leaf) else leaf for leaf in leaves])

    return jax.tree.unflatten(treedef, [leaf if is_array(leaf) else None for leaf in leaves]), restore
