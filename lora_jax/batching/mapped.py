"""Trees of which some leaves have a mapped axis, as `jax.vmap` is told by `in_axes`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax.leaves import is_array


def each(function: Callable[[Any, int], Any], axes: Any, tree: Any) -> Any:
    """The function of every leaf that has a mapped axis and of that axis; `axes` is a prefix of the tree."""

    def part(axis, subtree):
        return subtree if axis is None else jax.tree.map(lambda leaf: function(leaf, axis), subtree)

    axes = tuple(axes) if isinstance(tree, tuple) and isinstance(axes, list) else axes
    return jax.tree.map(part, axes, tree, is_leaf=lambda node: node is None)


def check_sizes(size: int, axes: Any, tree: Any, message: str) -> None:
    """Raises where a mapped axis has another size; `{}` in the message stands for it."""

    def check(leaf, axis):
        for found in np.shape(leaf)[axis:][:1]:
            if found != size:
                raise ValueError(message.format(found))

    each(check, axes, tree)


def arrays_apart(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with None in place of leaves that are no arrays, and a function that puts them back."""
    leaves, treedef = jax.tree.flatten(tree)

    def whole(arrays: Any) -> Any:
        queue = iter(jax.tree.leaves(arrays))
        return jax.tree.unflatten(treedef, [next(queue) if is_array(leaf) else leaf for leaf in leaves])

    return jax.tree.unflatten(treedef, [leaf if is_array(leaf) else None for leaf in leaves]), whole
