"""Splits trees in two: arrays from static leaves, and trained from frozen leaves."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lora_jax.leaves import is_array

ARRAY = object()
"""The placeholder of an array in :class:`Static`."""


@dataclasses.dataclass(frozen=True)
class Static:
    """A tree with a placeholder for each array. Hashable if its static leaves are, as `jax.jit` needs it.

    Attributes:
      treedef: The structure.
      leaves: The static leaves, and :data:`ARRAY` for each array.

    Example:
      >>> static, arrays = Static.split({"x": jax.numpy.ones(2), "mode": "fast"})
      >>> static.leaves[0], static.restore(["an array"])
      ('fast', {'mode': 'fast', 'x': 'an array'})
    """

    treedef: Any
    leaves: Sequence[Any]

    @classmethod
    def split(cls, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple["Static", list[Any]]:
        """Returns the static part of a tree, and its arrays in order."""
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
        static = cls(treedef, tuple(ARRAY if is_array(leaf) else leaf for leaf in leaves))
        return static, [leaf for leaf in leaves if is_array(leaf)]

    def restore(self, arrays: Iterable[Any]) -> Any:
        """Returns the tree with the given arrays."""
        queue = iter(arrays)
        return jax.tree.unflatten(self.treedef, [next(queue) if leaf is ARRAY else leaf for leaf in self.leaves])


@dataclasses.dataclass(frozen=True)
class Mask:
    """Splits the leaves of trees of one structure into two lists.

    Attributes:
      treedef: The structure.
      selected: Whether each leaf is in the first list.
    """

    treedef: Any
    selected: tuple[bool, ...]

    @classmethod
    def create(cls, mask: Any) -> "Mask":
        """Creates a mask from a tree of booleans."""
        leaves, treedef = jax.tree.flatten(mask)
        return cls(treedef, tuple(leaves))

    def split(self, tree: Any) -> tuple[list[Any], list[Any]]:
        """Returns the selected leaves and the others."""
        leaves = list(zip(self.selected, jax.tree.leaves(tree)))
        return [leaf for selected, leaf in leaves if selected], [leaf for selected, leaf in leaves if not selected]

    def restore(self, selected: Iterable[Any], others: Iterable[Any]) -> Any:
        """Returns the tree, the inverse of :meth:`split`."""
        queues = {True: iter(selected), False: iter(others)}
        return jax.tree.unflatten(self.treedef, [next(queues[flag]) for flag in self.selected])


def split_by(mask: Any, tree: Any) -> tuple[Any, Any]:
    """Returns two trees like `tree`: the leaves where the mask is true, and the others, with None for those missing.

    Example:
      >>> split_by({"a": True, "b": False}, {"a": 1, "b": 2})
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    selected = jax.tree.map(lambda flag, leaf: leaf if flag else None, mask, tree)
    return selected, jax.tree.map(lambda flag, leaf: None if flag else leaf, mask, tree)


def combine(one: Any, other: Any) -> Any:
    """Combines two trees that have None for each other's leaves; the inverse of :func:`split_by`.

    Raises:
      ValueError: Both trees have a value for a leaf.
    """

    def pick(leaf, alternative):
        if leaf is not None and alternative is not None:
            raise ValueError("A leaf has a value in both halves.")
        return alternative if leaf is None else leaf

    return jax.tree.map(pick, one, other, is_leaf=lambda leaf: leaf is None)
