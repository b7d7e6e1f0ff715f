"""Checks that the arrays and static fields of adapters are consistent with their declarations."""

import functools
import numbers
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from lora_jax.adapters import layouts
from lora_jax.adapters.protocol import Adapter, check_roles, is_adapter
from lora_jax.leaves import short


def check_adapters(delta: Any, advice: str = "", *, stacked: bool = False) -> None:
    """Raises unless `delta` is a complete delta of consistent adapters.

    Args:
      delta: The argument of a function.
      advice: The end of the message about an argument of another type.
      stacked: Whether arrays have an axis of members before those that their fields declare.

    Raises:
      TypeError: It is not a dict of adapters.
      ValueError: It is one half of `partition`, or the fields of an adapter contradict each other.
    """
    if not isinstance(delta, Mapping):
        if isinstance(getattr(delta, "delta", None), Mapping):
            advice = ": give its delta, state.delta"
        raise TypeError(f"delta is a dict from paths to adapters; got {_brief(delta)}{advice}.")
    for path, node in delta.items():
        if not is_adapter(node):
            raise TypeError(f"delta[{path!r}]: expected an Adapter, got {_brief(node)}{advice}.")
        if any(isinstance(leaf, bool) for leaf in jax.tree.leaves(node)):
            raise TypeError(f"delta[{path!r}] is a mask, not an adapter: {node}.")
        try:
            check_whole(node)
            if not stacked:
                check_adapter(node)
        except ValueError as error:
            hint = " This is a stack: lora.route applies it, lora.unstack gives its members." if is_stack(node) else ""
            raise ValueError(f"delta[{path!r}]: {error}{hint}") from None


def check_whole(node: Adapter) -> None:
    """Raises `ValueError` if required leaves of an adapter are None, or Python numbers."""
    for field in fields(node):  # pyrefly: ignore[bad-argument-type]
        if "trained" in field.metadata and not field.kw_only and getattr(node, field.name) is None:
            raise ValueError("it has leaves that are None: it is one half of partition(); give join(train, frozen).")
        for leaf in jax.tree.leaves(getattr(node, field.name)) if "trained" in field.metadata else ():
            if isinstance(leaf, numbers.Number):
                raise ValueError(f"{field.name} is {leaf!r}: expected an array, such as jnp.asarray({leaf!r}).")


def is_stack(node: Adapter) -> bool:
    """Whether an inconsistent adapter is consistent without the first axis of its arrays."""
    leaves, structure = jax.tree.flatten(node)
    if any(np.ndim(leaf) == 0 for leaf in leaves) or len({np.shape(leaf)[0] for leaf in leaves}) != 1:
        return False
    try:
        _check(structure, tuple((tuple(np.shape(leaf)[1:]), getattr(leaf, "dtype", None)) for leaf in leaves))
    except ValueError:
        return False
    return True


def check_adapter(node: Adapter) -> None:
    """Raises `ValueError` if fields of an adapter contradict each other: roles, blocks, the axes of its arrays."""
    leaves, structure = jax.tree.flatten(node)
    _check(structure, tuple((tuple(np.shape(leaf)), getattr(leaf, "dtype", None)) for leaf in leaves))


@functools.lru_cache(maxsize=4096)
def _check(structure: Any, types_of_leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    leaves = [jax.ShapeDtypeStruct(shape, dtype or np.float32) for shape, dtype in types_of_leaves]
    node = jax.tree.unflatten(structure, leaves)
    if not layouts.array_fields(node):  # an adapter of the package's own, such as a member of a stack
        return
    check_static_fields(node)
    axes, blocks = node.axes, getattr(node, "blocks", (True,))
    check_roles(f"axes={axes}", axes)
    if not any(blocks):
        raise ValueError(f"blocks={blocks}: no block is adapted.")
    layouts.check_sizes(node)
    if problem := node.find_inconsistency():
        raise ValueError(problem)
    shape, by_layouts = node.shape(), layouts.shape(node)
    if axes and len(shape) != len(axes):
        raise ValueError(f"axes={axes} are {len(axes)} roles; the arrays are those of a weight of shape {shape}.")
    if by_layouts is not None and by_layouts != shape:
        raise ValueError(f"shape() gives {shape}; by the layouts of its arrays the weight has the shape {by_layouts}.")


def check_static_fields(node: Adapter) -> None:
    """Raises `ValueError` if a static field is not of its type, or none of its choices.

    Needed separately for values from JSON: the cache of :func:`check_adapter` does not distinguish 0 from False.
    """
    for field in fields(node):  # pyrefly: ignore[bad-argument-type]
        if "static" in field.metadata:
            _check_static(field.name, getattr(node, field.name), field.type, field.metadata["choices"])


def _check_static(name: str, value: Any, annotation: Any, choices: tuple[Any, ...]) -> None:
    if not _fits(value, annotation):
        expected = annotation.__name__ if isinstance(annotation, type) else annotation
        raise ValueError(f"{name}={value!r}: expected {expected}.")
    if choices and value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(number, int) and number < 0 for number in numbers):
        raise ValueError(f"{name}={value!r} has a negative number.")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a static value is of its field's type, if that is a type of JSON values or a tuple of one."""
    if isinstance(annotation, types.GenericAlias) and annotation.__origin__ is tuple:
        inner = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(_fits(part, inner) for part in value)
    return type(value) is annotation if annotation in (str, int, float, bool) else True


def _brief(thing: Any) -> str:
    """A short description of a value, without the entries of arrays."""
    if isinstance(thing, str | os.PathLike):
        return f"the path {os.fspath(thing)!r} (are two arguments swapped?)"
    return short(thing) if hasattr(thing, "shape") else type(thing).__name__
