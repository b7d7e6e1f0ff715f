"""Whether the parts of an adapter fit each other, by what its fields declare: checked where adapters come in."""

import functools
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT, ROLES, SCALAR, SPLIT, WEIGHT, Adapter, is_adapter
from lora_jax.leaves import short


def check_adapters(delta: Any, advice: str = "", *, stacked: bool = False) -> None:
    """Raises unless `delta` is a whole delta, each adapter consistent in itself.

    Args:
      delta: What a function was given as a delta.
      advice: Ends the message about something else.
      stacked: Whether arrays have an axis of members before those that their fields declare.

    Raises:
      TypeError: It is no dict of adapters.
      ValueError: It is one half of `partition`, or the parts of an adapter contradict each other.
    """
    if not isinstance(delta, Mapping):
        if isinstance(getattr(delta, "delta", None), Mapping):
            advice = ": give its delta, state.delta"
        raise TypeError(f"delta is a dict from paths to adapters; got {_brief(delta)}{advice}.")
    for path, node in delta.items():
        if not is_adapter(node):
            raise TypeError(f"delta[{path!r}] is no adapter but {_brief(node)}{advice}.")
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
    """Raises `ValueError` where leaves of an adapter are None that may not be absent."""
    for field in fields(node):  # pyrefly: ignore[bad-argument-type]
        if "trained" in field.metadata and not field.kw_only and getattr(node, field.name) is None:
            raise ValueError("it has leaves that are None: it is one half of partition(); give join(train, frozen).")


def is_stack(node: Adapter) -> bool:
    """Whether an adapter that is inconsistent in itself is consistent without the first axis of its arrays."""
    leaves, structure = jax.tree.flatten(node)
    if any(np.ndim(leaf) == 0 for leaf in leaves) or len({np.shape(leaf)[0] for leaf in leaves}) != 1:
        return False
    try:
        _check(structure, tuple((tuple(np.shape(leaf)[1:]), getattr(leaf, "dtype", None)) for leaf in leaves))
    except ValueError:
        return False
    return True


def check_adapter(node: Adapter) -> None:
    """Raises `ValueError` where fields of an adapter contradict each other: roles, blocks, the axes of its arrays."""
    leaves, structure = jax.tree.flatten(node)
    _check(structure, tuple((tuple(np.shape(leaf)), getattr(leaf, "dtype", None)) for leaf in leaves))


@functools.lru_cache(maxsize=4096)
def _check(structure: Any, types_of_leaves: tuple[tuple[tuple[int, ...], Any], ...]) -> None:
    leaves = [jax.ShapeDtypeStruct(shape, dtype or np.float32) for shape, dtype in types_of_leaves]
    node = jax.tree.unflatten(structure, leaves)
    arrays = {field.name: field for field in fields(node) if "trained" in field.metadata}
    if not arrays:  # what stands for an adapter declares nothing
        return
    check_static_fields(node)
    axes, blocks = node.axes, getattr(node, "blocks", (True,))
    if unknown := [role for role in axes if role not in ROLES]:
        raise ValueError(f"axes={axes}: {unknown[0]!r} is no axis role; the roles are {', '.join(ROLES)}.")
    if not any(blocks):
        raise ValueError(f"blocks={blocks}: no block is adapted.")
    sizes: dict[Any, tuple[int, str]] = {"block": (sum(blocks), "blocks")}
    for name, field in arrays.items():
        array = getattr(node, name)
        if isinstance(array, jax.ShapeDtypeStruct) and field.metadata["layout"]:
            _check_array(node, name, array.shape, field.metadata["leading"], sizes)
    if problem := node.contradiction():
        raise ValueError(problem)
    shape = node.shape()
    if axes and len(shape) != len(axes):
        raise ValueError(f"axes={axes} are {len(axes)} roles; the arrays are those of a weight of shape {shape}.")
    for axis, size in enumerate(shape):
        known = sizes.get(axis, (size, ""))
        parts = len(blocks) if axes and axes[axis] == OUT and "block" in _layouts(node) else 1
        if known[0] * parts != size:
            raise ValueError(f"the weight's axis {axis} is {size} by its other parts and {known[0]} by {known[1]}.")


def _layouts(node: Adapter) -> set[str]:
    return {word for field in fields(node) for word in field.metadata.get("layout", "").split()}  # pyrefly: ignore


def _check_array(node: Adapter, name: str, shape: tuple[int, ...], leading: bool, sizes: dict[Any, Any]) -> None:
    """Compares an array with its declared layout, and its sizes with those of the arrays before it."""
    words, blocks = node.layout(name).split(), getattr(node, "blocks", (True,))
    divided = len(blocks) > 1 and "block" not in words and "block" in _layouts(node)
    keys: list[tuple[str, Any]] = []
    for word in words:
        roles = (IN, LOOKUP) if word == IN else (word,)
        if word in (BATCH, IN, OUT):
            keys += [(word, axis) for axis, role in enumerate(node.axes) if role in roles]
        elif word.startswith(SPLIT):
            keys += [(word, (word, axis)) for axis, role in enumerate(node.axes) if role == word.removeprefix(SPLIT)]
        elif word == WEIGHT:
            keys += [(word, axis) for axis in range(len(shape))]
        elif word != SCALAR:
            keys.append((word, word))
    if len(shape) != len(keys) and not (leading and len(shape) < len(keys)):
        raise ValueError(
            f"{name} has the shape {shape}; {' '.join(word for word, _ in keys) or 'a scalar'} is expected, "
            f"{len(keys)} axes, with the roles {node.axes}."
        )
    for (word, key), size in zip(keys, shape):
        if divided and word == OUT:
            size, rest = divmod(size, len(blocks))
            if rest:
                raise ValueError(f"{name} has the shape {shape}, whose out axis is no multiple of the blocks.")
        before = sizes.setdefault(key, (size, name))
        if before[0] != size:
            raise ValueError(f"{name} has the shape {shape}, with {size} for {word}; by {before[1]} it is {before[0]}.")


def check_static_fields(node: Adapter) -> None:
    """Raises `ValueError` where a static field is not of its type, or none of its choices.

    By itself for what comes of JSON: :func:`check_adapter` takes 0 for the False that it compares equal to.
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
    """Whether a static value is of its field's type, where that is a type of JSON values or a tuple of one."""
    if isinstance(annotation, types.GenericAlias) and annotation.__origin__ is tuple:
        inner = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(_fits(part, inner) for part in value)
    return type(value) is annotation if annotation in (str, int, float, bool) else True


def _brief(thing: Any) -> str:
    """What a thing is, in a few words: no array is printed."""
    if isinstance(thing, str | os.PathLike):
        return f"the path {os.fspath(thing)!r} (are two arguments swapped?)"
    return short(thing) if hasattr(thing, "shape") else type(thing).__name__
