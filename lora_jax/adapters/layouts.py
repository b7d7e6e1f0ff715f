"""The layouts of an adapter's fields: the axes of each array, and the shapes, ranks and labels derived from them.

A layout names the axes of an array in words, such as `"batch rank in"`:

  batch, in, out    the weight's axes of that role
  block             the adapted blocks of the out axis; absent when there is one block
  rank              an axis that :meth:`Adapter.pad_rank` enlarges; twice in a layout for a square matrix
  slow-in, fast-in  parts of the in axes if the static field `split` divides one of them: its slow part; its fast part
                    and all other in axes (likewise slow-out, fast-out)
  weight            all axes of the weight, whatever their roles
  scalar            no axis

The name of a static field that holds a role stands for that role, and `~name` for the opposite one. Any other word is
the size of an axis that the weight does not have; :func:`lora_jax.adapters.protocol.adapter` declares these.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths

BATCH, IN, OUT, LOOKUP = "batch", "in", "out", "lookup"
"""Axis roles. `lookup` is an in axis that is indexed (an embedding's vocabulary) instead of contracted."""
ROLES = (BATCH, IN, OUT, LOOKUP)

BLOCK, RANK, WEIGHT, SCALAR = "block", "rank", "weight", "scalar"
SLOW, FAST = "slow-", "fast-"
WORDS = (BATCH, IN, OUT, BLOCK, RANK, WEIGHT, SCALAR, *(part + role for role in (IN, OUT) for part in (SLOW, FAST)))
"""The words that every layout may use."""

_OPPOSITE = {IN: OUT, OUT: IN}


def check_layouts(cls: type, kind: str, sizes: Collection[str]) -> None:
    """Raises `ValueError` unless every layout of an adapter class consists of words that exist and fit together."""
    fields = dataclasses.fields(cls)
    holders = [field.name for field in fields if _holds_role(field)]
    for size in sizes:
        if size in WORDS or size in holders or not size.isidentifier():
            what = "has a meaning in layouts already" if size in WORDS or size in holders else "is not an identifier"
            raise ValueError(f"adapter({kind!r}, sizes={tuple(sizes)}): {size!r} {what}. Choose another name.")
    for field in fields:
        layout = field.metadata.get("layout", "")
        if not isinstance(layout, str):
            raise TypeError(
                f"{cls.__name__}.{field.name}: a layout is a string of words, 'batch rank in'; got {layout!r}."
            )
        words = layout.split()
        where = f"{cls.__name__}.{field.name}: the layout {' '.join(words)!r}"
        if BATCH in words[1:]:
            raise ValueError(f"{where} has 'batch' after another word; batch axes come first.")
        for word in words:
            _check_word(where, word, kind, sizes, holders)
            limit = 2 if word == RANK else len(words) if word in sizes else 1
            if words.count(word) > limit:
                raise ValueError(
                    f"{where} has {word!r} {words.count(word)} times; only sizes may repeat, and the rank may be there "
                    "twice."
                )
            if word in (SCALAR, WEIGHT) and len(words) > 1:
                raise ValueError(f"{where} has other words beside {word!r}, which names all axes of the array.")
            if word.startswith((SLOW, FAST)) and not any(
                other.name == "split" and "static" in other.metadata for other in fields
            ):
                raise ValueError(
                    f"{where} has {word!r}, but {cls.__name__} has no static field `split`, which gives the axes that "
                    "are in two parts."
                )

    words = {word for field in fields for word in field.metadata.get("layout", "").split()}
    for size in sizes:
        if size not in words:
            raise ValueError(f"adapter({kind!r}, sizes=…): no layout of {cls.__name__} has the size {size!r}.")


def _check_word(where: str, word: str, kind: str, sizes: Collection[str], holders: Collection[str]) -> None:
    vocabulary = [*WORDS, *sizes, *holders, *(f"~{name}" for name in holders)]
    if word not in vocabulary:
        name = word.removeprefix("~")
        declare = f"adapter({kind!r}, sizes=({name!r},))"
        raise ValueError(
            f"{where} has the unknown word {word!r}; {paths.nearest(word, vocabulary)}. The words are "
            f"{', '.join((*WORDS, *sizes))}, and the names of static fields that hold a role, such as side: str = "
            f"static(choices=('in', 'out')). Declare the size of an axis that the weight does not have: {declare}."
        )


def _holds_role(field: dataclasses.Field) -> bool:
    """Whether a field is a static one whose value is a role."""
    is_string = "static" in field.metadata and field.type in (str, "str")
    return is_string and set(field.metadata["choices"]) <= {BATCH, IN, OUT}


def labels(node: Any, name: str) -> tuple[str, ...]:
    """The label of each axis of a field's array; an axis of the weight is labeled by its number.

    The slow and the fast part of axis 1 are '1.0' and '1.1'. A size that occurs twice gets a prime.
    """
    return tuple(label for _, label in labeled_words(node, name))


def labeled_words(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Per axis of a field's array (or entry of a static field that holds sizes), its word and its label."""
    seen: set[str] = set()
    axes, split = node.axes, getattr(node, "split", ())
    for word in _metadata(node, name)["layout"].split():
        word = _resolved(node, word)
        part, role = (word[:5], word[5:]) if word.startswith((SLOW, FAST)) else ("", word)
        if role in (BATCH, IN, OUT):
            for axis, axis_role in enumerate(axes):
                if (IN if axis_role == LOOKUP else axis_role) != role or (part == SLOW and axis not in split):
                    continue
                yield word, f"{axis}.{0 if part == SLOW else 1}" if part and axis in split else str(axis)
        elif word == WEIGHT:
            yield from ((word, str(axis)) for axis in range(np.ndim(getattr(node, name))))
        elif word != SCALAR and not (word == BLOCK and blocks(node) == 1):
            label = word
            while label in seen:
                label += "'"
            seen.add(label)
            yield word, label


def axis_labels(node: Any) -> tuple[tuple[str, ...], ...]:
    """Per axis of the weight, the labels that make it up, the slowest first."""
    split, fused = getattr(node, "split", ()), blocks(node) > 1
    return tuple(
        (f"{axis}.0", f"{axis}.1") if axis in split else (BLOCK, str(axis)) if fused and role == OUT else (str(axis),)
        for axis, role in enumerate(node.axes)
    )


def blocks(node: Any) -> int:
    """The number of blocks of the out axis."""
    return len(getattr(node, "blocks", (True,)))


def shape(node: Any) -> tuple[int, ...] | None:
    """The shape of the weight, from the sizes of arrays and of static fields; None if they do not determine it."""
    leaves, structure = jax.tree.flatten(node)
    return _shape(structure, tuple(getattr(leaf, "shape", None) for leaf in leaves))


@functools.lru_cache(maxsize=4096)
def _shape(structure: Any, shapes: tuple[tuple[int, ...] | None, ...]) -> tuple[int, ...] | None:
    structs = [None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    node = jax.tree.unflatten(structure, structs)
    sizes: dict[str, int] = {}
    for name, array_sizes in _declared(node):
        if WEIGHT in _words(node, name) and not _metadata(node, name)["leading"]:
            return array_sizes
        pairs = list(labeled_words(node, name))
        # Counted from the end: arrays of a stack begin with an axis of members.
        for (word, label), size in zip(reversed(pairs), reversed(array_sizes)):
            if len(array_sizes) >= len(pairs):
                sizes.setdefault(label, size // (blocks(node) if word == OUT and _is_whole(node, name) else 1))
    sizes[BLOCK] = blocks(node)
    if any(label not in sizes for axis in axis_labels(node) for label in axis):
        return None
    return tuple(math.prod(sizes[label] for label in axis) for axis in axis_labels(node))


def check_sizes(node: Any) -> None:
    """Raises `ValueError` if the arrays of an adapter contradict their layouts or each other."""
    sizes: dict[str, tuple[int, str]] = {BLOCK: (sum(getattr(node, "blocks", (True,))), "blocks")}
    for name, array_sizes in _declared(node):
        pairs = list(labeled_words(node, name))
        leading = _metadata(node, name)["leading"]
        if len(array_sizes) != len(pairs) and not (leading and len(array_sizes) < len(pairs)):
            raise ValueError(
                f"{name} has the shape {array_sizes}; {' '.join(word for word, _ in pairs) or 'a scalar'} is expected, "
                f"{len(pairs)} axes, with the roles {node.axes}."
            )
        for (word, label), size in zip(pairs, array_sizes):
            if word == OUT and _is_whole(node, name):
                size, rest = divmod(size, blocks(node))
                if rest:
                    raise ValueError(
                        f"{name} has the shape {array_sizes}, whose out axis is no multiple of the blocks."
                    )
            label = label.rstrip("'")
            expected, other = sizes.setdefault(label, (size, name))
            if expected != size:
                raise ValueError(
                    f"{name} has the shape {array_sizes}, with {size} for {word}; by {other} it is {expected}."
                )


def rank_axes(node: Any) -> dict[str, tuple[int, ...]]:
    """Per field with a rank, the axes of its array that are ranks, counted from the end."""
    axes = {}
    for name in array_fields(node):
        names = [label.rstrip("'") for label in labels(node, name)]
        if RANK in names and getattr(node, name) is not None:
            axes[name] = tuple(axis - len(names) for axis, label in enumerate(names) if label == RANK)
    return axes


def zeros(node: Any) -> dict[str, jax.Array]:
    """Zeros for all arrays of an adapter but scales and scalars: what makes its term zero, with no gradient."""
    arrays = {name: getattr(node, name) for name in array_fields(node) if not _is_scale(node, name)}
    return {name: jnp.zeros_like(array) for name, array in arrays.items() if array is not None}


def array_fields(node: Any) -> list[str]:
    """The names of the fields that hold arrays."""
    return [field.name for field in dataclasses.fields(node) if "trained" in field.metadata]


def _declared(node: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The fields that declare sizes, arrays and static ones, with the sizes that they hold."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if not field.metadata.get("layout"):
            continue
        if "static" in field.metadata:
            yield field.name, value if isinstance(value, tuple) else (value,)
        elif hasattr(value, "shape"):
            yield field.name, tuple(value.shape)


def _metadata(node: Any, name: str) -> Any:
    return type(node).__dataclass_fields__[name].metadata


def _words(node: Any, name: str) -> list[str]:
    return _metadata(node, name)["layout"].split()


def _resolved(node: Any, word: str) -> str:
    """A word, or the role that the static field of this name holds."""
    if word in WORDS:
        return word
    name = word.removeprefix("~")
    if name not in type(node).__dataclass_fields__:
        return word
    role = getattr(node, name)
    return _OPPOSITE[role] if word.startswith("~") else role


def _is_whole(node: Any, name: str) -> bool:
    """Whether a field has the whole out axis while other fields have its blocks."""
    return blocks(node) > 1 and BLOCK not in _words(node, name)


def _is_scale(node: Any, name: str) -> bool:
    return _metadata(node, name)["leading"] or _words(node, name) == [SCALAR]
