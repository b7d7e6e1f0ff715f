"""A row of a table of names, and a leaf bound to it: which tensors hold the leaf, and in which layout."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lora_jax.peft.templates import (
    Axes,
    fill,
    layout_labels,
    name_pattern,
    parse_layout,
    path_pattern,
    placeholders,
)
from lora_jax.renamed import former_members

ModuleKind = Literal["linear", "conv1d", "embedding", "conv", "experts", "transposed_experts"]
MODULE_ROLES: dict[str, tuple[str, ...]] = {
    "linear": ("out", "in"),
    "conv1d": ("in", "out"),  # transformers' name for the linear layer of GPT-2
    "embedding": ("lookup", "out"),
    "conv": ("out", "in"),  # and the window's axes, which are contracted too
    "experts": ("batch", "out", "in"),  # one parameter for all experts
    "transposed_experts": ("batch", "in", "out"),
}
"""The axis roles of a module's tensor, by the module's kind."""

Read = Callable[[str, tuple[slice, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """The names and the layout of the PyTorch tensors that hold the leaves of one path.

    A placeholder, `{layer}` for numbers or `{part=query|key|value}` for words, matches the same text in
    `path` and `name`. If a leaf's path lacks a placeholder's segment, the leaf stacks all of its values
    along leading axes; so one row serves unrolled and scanned layers. A placeholder of `name` alone is an
    axis that `layout` names: a fused kernel that PyTorch stores as several tensors.

    Attributes:
      path: The full path of the leaf, '/'-joined.
      name: The name of the tensor, `model.layers.{layer}.mlp.up_proj.weight`.
      layout: The leaf's axes, an arrow, the tensor's axes; parentheses group labels that share an axis,
        the slowest first: `"in heads width -> (heads width) in"`. Empty if both are equal.
      module: The kind of the PyTorch module, which defines the tensor's in and out axes: see `MODULE_ROLES`.
        Empty: 'linear' for a matrix, 'conv' for more axes.
      in_model: The tensor's name in PyTorch's running model, if checkpoint files have another (transformers 5
        renames some tensors when it loads them). Adapters are written with it, and read with either.
      tied: Names of further tensors that are the same parameter in PyTorch (`lm_head.weight`), with the
        layout of `name`.

    Example:
      >>> row = Weight("layers/{layer}/query/kernel", "h.{layer}.q.weight", "in out -> out in")
      >>> row.bind("layers/3/query/kernel", (4, 6)).shapes
      {'h.3.q.weight': (6, 4)}
      >>> row.bind("layers/query/kernel", (2, 4, 6)).shapes
      {'h.0.q.weight': (6, 4), 'h.1.q.weight': (6, 4)}
    """

    path: str
    name: str
    layout: str = ""
    _: dataclasses.KW_ONLY
    module: ModuleKind | Literal[""] = ""
    in_model: str = ""
    tied: tuple[str, ...] = ()

    def __post_init__(self):
        leaf_labels, tensor_labels = layout_labels(self.layout)
        in_path = placeholders(self.path)
        for name in (self.name, *self.tied):
            unknown = [label for label in placeholders(name) if label not in in_path and label not in leaf_labels]
            if unknown:
                raise ValueError(f"{name!r}: {{{unknown[0]}}} is neither in the path {self.path!r} nor in the layout.")
        removed = set(leaf_labels) - set(tensor_labels) - set(placeholders(self.name))
        added = set(tensor_labels) - set(leaf_labels)
        if removed or added:
            raise ValueError(f"The layout {self.layout!r} has different axes on its sides: {sorted(removed | added)}.")

    @functools.cached_property
    def words(self) -> dict[str, tuple[str, ...]]:
        """The words of each placeholder; those for numbers have none."""
        return placeholders(self.path) | {k: v for k, v in placeholders(self.name).items() if v}

    def examples(self) -> Iterator[str]:
        """Yields its tensors' names, with 0 for each number and every word of a choice of words."""
        for name in (self.in_model or self.name, *self.tied):
            labels = list(placeholders(name))
            for texts in itertools.product(*(self.words.get(label) or ("0",) for label in labels)):
                yield fill(name, dict(zip(labels, texts)))

    def declares(self, name: str) -> bool:
        """Whether a name of a running model's tensor matches this row."""
        words = tuple(sorted(self.words.items()))
        return any(
            name_pattern(template, words).fullmatch(name) for template in (self.in_model or self.name, *self.tied)
        )

    def bind(self, path: str, shape: Sequence[int]) -> "Binding | None":
        """Binds a leaf of this path and shape to its tensors; returns None if the path does not match.

        Raises:
          ValueError: The path matches and the shape does not fit the layout.
        """
        if (match := path_pattern(self.path).fullmatch(path)) is None:
            return None
        fixed = {label: text for label, text in match.groupdict().items() if text is not None}
        stacked = tuple(label for label, text in match.groupdict().items() if text is None)
        try:
            return Binding(self, path, tuple(shape), fixed, stacked)
        except ValueError as error:
            raise ValueError(f"{path!r} of shape {tuple(shape)} does not fit {self}: {error}") from None


@dataclasses.dataclass(frozen=True)
@former_members(left="leaf_axes", right="tensor_axes", running="index_labels")
class Binding:
    """A leaf and the tensors that hold it.

    Attributes:
      weight: The row.
      path: The leaf's path.
      shape: The leaf's shape.
      fixed: The text of each placeholder that the path contains.
      stacked: The placeholders that are leading axes of the leaf.
    """

    weight: Weight
    path: str
    shape: tuple[int, ...]
    fixed: Mapping[str, str]
    stacked: tuple[str, ...]

    def __post_init__(self):
        if len(self.leaf_axes) != len(self.shape):
            raise ValueError(f"expected {len(self.leaf_axes)} axes, got {len(self.shape)}")
        sizes = self.sizes
        for labels, size in zip(self.leaf_axes, self.shape):
            if math.prod(sizes[label] for label in labels) != size:
                raise ValueError(f"axis {' '.join(labels)} has size {size}, expected {[sizes[x] for x in labels]}")

    @functools.cached_property
    def leaf_axes(self) -> Axes:
        """The labels of each axis of the leaf."""
        if self.weight.layout:
            axes = parse_layout(self.weight.layout)[0]
        else:
            axes = tuple((f"_{axis}",) for axis in range(len(self.shape) - len(self.stacked)))
        return (*((label,) for label in self.stacked), *axes)

    @functools.cached_property
    def tensor_axes(self) -> Axes:
        """The labels of each axis of a tensor."""
        if self.weight.layout:
            return parse_layout(self.weight.layout)[1]
        return self.leaf_axes[len(self.stacked) :]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each label."""
        words = placeholders(self.weight.path) | placeholders(self.weight.name)
        in_leaf = set(itertools.chain(*self.leaf_axes))
        sizes = {label: len(texts) for label, texts in words.items() if texts and label in in_leaf}
        for labels, size in zip(self.leaf_axes, self.shape):
            unknown = [label for label in labels if label not in sizes]
            if len(unknown) > 1:
                raise ValueError(f"the sizes of {' and '.join(unknown)} are ambiguous")
            for label in unknown:
                sizes[label] = size // math.prod(sizes[x] for x in labels if x != label)
        return sizes

    @functools.cached_property
    def index_labels(self) -> tuple[str, ...]:
        """The labels that enumerate the tensors, in the leaf's order."""
        in_tensor = set(itertools.chain(*self.tensor_axes))
        return tuple(label for label in itertools.chain(*self.leaf_axes) if label not in in_tensor)

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The name of each tensor and its index: a position along each of `index_labels`."""
        return dict(self._named(self.weight.name))

    @functools.cached_property
    def tied(self) -> dict[str, str]:
        """The names of tied tensors, each with the name of the tensor that it equals."""
        others = [name for template in self.weight.tied for name, _ in self._named(template)]
        return dict(zip(others, itertools.cycle(self.tensors)))

    @functools.cached_property
    def in_model(self) -> dict[str, str]:
        """The names of the tensors in PyTorch's running model, by their names in checkpoint files."""
        renamed = [name for name, _ in self._named(self.weight.in_model or self.weight.name)]
        return dict(zip(self.tensors, renamed))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of each tensor."""
        return dict.fromkeys(self.tensors, self.tensor_shape)

    @property
    def kind(self) -> str:
        """The kind of the module; empty for a vector or a scalar whose row states none."""
        return self.weight.module or {0: "", 1: "", 2: "linear"}.get(len(self.tensor_axes), "conv")

    @property
    def roles(self) -> tuple[str, ...] | None:
        """The role of each axis of a tensor; None for a tensor that no product contracts (a bias, a norm)."""
        ndim = len(self.tensor_axes)
        if not self.kind:
            return None
        roles = MODULE_ROLES[self.kind]
        if self.kind == "conv":
            roles += ("in",) * (ndim - 2)
        if len(roles) != ndim:
            raise ValueError(f"{self.path!r}: a tensor of module={self.kind!r} has {len(roles)} axes, not {ndim}")
        return roles

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        return tuple(math.prod(self.sizes[label] for label in labels) for labels in self.tensor_axes)

    def resized(self, shape: Sequence[int]) -> "Binding":
        """The binding of a leaf whose tensor has another size along its first axis."""
        if tuple(shape) == self.tensor_shape:
            return self
        first = self.tensor_axes[0]
        axis = next(i for i, labels in enumerate(self.leaf_axes) if labels == first)
        return dataclasses.replace(self, shape=(*self.shape[:axis], shape[0], *self.shape[axis + 1 :]))

    def _named(self, template: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        words = self.weight.words
        for index in itertools.product(*(range(self.sizes[label]) for label in self.index_labels)):
            texts = dict(self.fixed)
            for label, i in zip(self.index_labels, index):
                texts[label] = words[label][i] if words.get(label) else str(i)
            yield fill(template, texts), index

    def split(self, leaf: Any) -> dict[str, Any]:
        """Splits a leaf into its tensors; they are views of it if possible."""
        labels = list(itertools.chain(*self.leaf_axes))
        order = [*self.index_labels, *itertools.chain(*self.tensor_axes)]
        array = leaf.reshape([self.sizes[label] for label in labels])
        array = array.transpose([labels.index(label) for label in order])
        return {name: array[index].reshape(self.tensor_shape) for name, index in self.tensors.items()}

    def join(self, read: Read, dtype: Any, window: Sequence[slice] | None = None) -> np.ndarray:
        """Assembles the leaf, or a part of it, from its tensors.

        Reads one tensor at a time, and no more of it than the part needs.

        Args:
          read: `read(name, slices)` returns a part of a tensor.
          dtype: The dtype of the result.
          window: A slice for each axis of the leaf; None for the full leaf.
        """
        window = [slice(*part.indices(n)) for part, n in zip(window or [slice(None)] * len(self.shape), self.shape)]
        limits = {label: slice(0, size) for label, size in self.sizes.items()}
        limits |= {labels[0]: part for labels, part in zip(self.leaf_axes, window) if len(labels) == 1}
        lengths = {label: limit.stop - limit.start for label, limit in limits.items()}

        # An axis of several labels is read for a range of the first label, then sliced along the others.
        ranges, read_shape, slices = [], [], []
        for first, *rest in self.tensor_axes:
            step = math.prod(self.sizes[label] for label in rest)
            ranges.append(slice(limits[first].start * step, limits[first].stop * step))
            read_shape += [lengths[first], *(self.sizes[label] for label in rest)]
            slices += [slice(None), *(limits[label] for label in rest)]

        labels = list(itertools.chain(*self.leaf_axes))
        leaf = np.empty([lengths[label] for label in labels], dtype)
        order = (*self.index_labels, *itertools.chain(*self.tensor_axes))
        by_tensor = leaf.transpose([labels.index(label) for label in order])
        for name, index in self.tensors.items():
            offsets = tuple(i - limits[label].start for label, i in zip(self.index_labels, index))
            if all(0 <= i < lengths[label] for label, i in zip(self.index_labels, offsets)):
                by_tensor[offsets] = read(name, tuple(ranges)).reshape(read_shape)[tuple(slices)]
        leaf = leaf.reshape([math.prod(lengths[label] for label in labels) for labels in self.leaf_axes])
        return leaf[tuple(slice(None) if len(labels) == 1 else part for labels, part in zip(self.leaf_axes, window))]
