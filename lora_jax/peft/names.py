"""Where each leaf of a model stands in a PyTorch checkpoint, and in which layout: data, not a converter a model."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from lora_jax.paths import nearest
from lora_jax.renamed import RenamedMethod

Module = Literal["linear", "conv1d", "embedding", "conv", "experts", "transposed_experts"]
MODULES: dict[str, tuple[str, ...]] = {
    "linear": ("out", "in"),
    "conv1d": ("in", "out"),  # transformers' name for the linear layer of GPT-2
    "embedding": ("lookup", "out"),
    "conv": ("out", "in"),  # and the window's axes, which are contracted too
    "experts": ("batch", "out", "in"),  # one parameter for all experts
    "transposed_experts": ("batch", "in", "out"),
}
"""The axis roles of a module's tensor."""

SAME = ""
LINEAR = "in out -> out in"
CONV1D = "width in out -> out in width"
CONV2D = "height width in out -> out in height width"
CONV3D = "depth height width in out -> out in depth height width"

Read = Callable[[str, tuple[slice, ...]], np.ndarray]

_AXIS = re.compile(r"\(([\w ]+)\)|(\w+)")
_PLACEHOLDER = re.compile(r"\{(\w+)(?:=([^{}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where the leaves that match one path stand in a PyTorch checkpoint.

    A placeholder, `{layer}` for numbers or `{part=query|key|value}` for words, stands for the same text in
    `path` and `name`. Where a leaf's path lacks a placeholder's segment, the leaf holds all of them, stacked
    along its leading axes; so one row serves unrolled and scanned layers. A placeholder of `name` alone is an
    axis that `layout` names: a fused kernel that PyTorch keeps in parts.

    Attributes:
      path: The whole path of the leaf, '/'-joined.
      name: The name of the tensor, `model.layers.{layer}.mlp.up_proj.weight`.
      layout: The leaf's axes, an arrow, the tensor's axes; parentheses group axes that are one in the array,
        the slowest first: `"in heads width -> (heads width) in"`. Empty where both agree.
      module: What the PyTorch module does with the tensor, which tells its in and out axes: see `MODULES`.
        Empty: 'linear' for a matrix, 'conv' for more axes.
      in_model: The tensor's name in PyTorch's running model, where checkpoint files have another (transformers 5
        renames some as it loads them). Adapters are written with it, and read with either.
      tied: Names of further tensors that are the same parameter in PyTorch (`lm_head.weight`), with the
        layout of `name`.

    Example:
      >>> row = Weight("layers/{layer}/query/kernel", "h.{layer}.q.weight", LINEAR)
      >>> row.bind("layers/3/query/kernel", (4, 6)).shapes
      {'h.3.q.weight': (6, 4)}
      >>> row.bind("layers/query/kernel", (2, 4, 6)).shapes
      {'h.0.q.weight': (6, 4), 'h.1.q.weight': (6, 4)}
    """

    path: str
    name: str
    layout: str = SAME
    _: dataclasses.KW_ONLY
    module: Module | Literal[""] = ""
    in_model: str = ""
    tied: tuple[str, ...] = ()

    def __post_init__(self):
        left, right = _sides(self.layout)
        for name in (self.name, *self.tied):
            words = _placeholders(name)
            if unknown := [
                label for label in words if label not in {**_placeholders(self.path), **dict.fromkeys(left)}
            ]:
                raise ValueError(f"{name!r}: {{{unknown[0]}}} is neither in the path {self.path!r} nor in the layout.")
        lost, added = set(left) - set(right) - set(_placeholders(self.name)), set(right) - set(left)
        if lost or added:
            raise ValueError(f"The layout {self.layout!r} has different axes on its sides: {sorted(lost | added)}.")

    def examples(self) -> Iterator[str]:
        """Its tensors' names with 0 for each number and every word for a choice of words."""
        words = _placeholders(self.path) | {k: v for k, v in _placeholders(self.name).items() if v}
        for name in (self.in_model or self.name, *self.tied):
            labels = list(_placeholders(name))
            for texts in itertools.product(*(words.get(label) or ("0",) for label in labels)):
                given = dict(zip(labels, texts))
                yield _PLACEHOLDER.sub(lambda found: given[found[1]], name)  # noqa: B023

    def declares(self, name: str) -> bool:
        """Whether a tensor of a running model may be one of this row's."""
        words = _placeholders(self.path) | {k: v for k, v in _placeholders(self.name).items() if v}
        for template in (self.in_model or self.name, *self.tied):
            if _template(template, tuple(sorted(words.items()))).fullmatch(name):
                return True
        return False

    def bind(self, path: str, shape: Sequence[int]) -> "Binding | None":
        """Where a leaf of this path and shape stands; None where the path does not match.

        Raises:
          ValueError: The path matches and the shape does not fit the layout.
        """
        if (match := _pattern(self.path).fullmatch(path)) is None:
            return None
        fixed = {label: text for label, text in match.groupdict().items() if text is not None}
        stacked = tuple(label for label, text in match.groupdict().items() if text is None)
        try:
            return Binding(self, path, tuple(shape), fixed, stacked)
        except ValueError as error:
            raise ValueError(f"{path!r} of shape {tuple(shape)} does not fit {self}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Fused:
    """A parameter of PyTorch's running model that holds a matrix or several of each expert, `[experts, out, in]`.

    transformers 5 makes it of the experts' own tensors as it loads them; adapters are of the parameter.

    Attributes:
      parameter: Its name, `model.layers.{layer}.mlp.experts.gate_up_proj`.
      parts: The names of an expert's matrices in checkpoint files, with `{expert}`, in their order along `out`.
    """

    parameter: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a model's weights in PyTorch; a model declares them once.

    Attributes:
      weights: Rows; for each leaf the first that matches counts. Several parameters of one module (experts) stand
        in the order in which PyTorch's module has them.
      prefix: What begins every name, and is left out in checkpoints of the bare model ('bert.').
      fused: Parameters of the running model that are made of several tensors; those of one module in its order.

    Example:
      >>> names = Names((Weight("wte/embedding", "wte.weight", module="embedding"),))
      >>> list(names.find("wte/embedding", (8, 2)).shapes)
      ['wte.weight']
    """

    weights: tuple[Weight, ...]
    prefix: str = ""
    fused: tuple[Fused, ...] = ()

    def get(self, path: str, shape: Sequence[int]) -> "Binding | None":
        """Where a leaf stands; None where no row matches its path.

        Raises:
          ValueError: Its shape does not fit the row that matches.
        """
        rows = [*self._patterns, *([self._literals[path]] if path in self._literals else [])]
        for number in sorted(rows):
            if binding := self.weights[number].bind(path, shape):
                return binding
        return None

    def __getattr__(self, name: str) -> NoReturn:
        if name == "place":
            raise AttributeError("Names.place has been renamed to get.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @functools.cached_property
    def _literals(self) -> dict[str, int]:
        """The rows whose path has no placeholder: a checkpoint's own names are thousands of these."""
        numbered = reversed(list(enumerate(self.weights)))  # of rows with one path the first counts
        return {row.path: number for number, row in numbered if "{" not in row.path}

    @functools.cached_property
    def _patterns(self) -> list[int]:
        return [number for number, row in enumerate(self.weights) if "{" in row.path]

    def in_files(self) -> "Names":
        """The same weights by their names in checkpoint files alone."""
        return dataclasses.replace(
            self, weights=tuple(dataclasses.replace(row, in_model="") for row in self.weights), fused=()
        )

    def find(self, path: str, shape: Sequence[int]) -> "Binding":
        """Where a leaf stands.

        Raises:
          ValueError: No row matches its path, or its shape does not fit the row that does.
        """
        if (binding := self.get(path, shape)) is None:
            raise ValueError(f"no name is declared for {path!r}; {nearest(path, [row.path for row in self.weights])}")
        return binding


def check_names(where: str, names: Any) -> None:
    """Raises `TypeError` unless `names` says where the leaves of a model stand in PyTorch."""
    if not isinstance(names, Names):
        raise TypeError(
            f"{where}: names is a lora.peft.Names, which says where each leaf stands in PyTorch; got "
            f"{type(names).__name__}."
        )


@dataclasses.dataclass(frozen=True)
class Binding:
    """One leaf and the tensors that hold it.

    Attributes:
      weight: The row.
      path: Of the leaf.
      shape: Of the leaf.
      fixed: Placeholders that the path gives.
      stacked: Placeholders that are leading axes of the leaf.
    """

    weight: Weight
    path: str
    shape: tuple[int, ...]
    fixed: Mapping[str, str]
    stacked: tuple[str, ...]

    def __post_init__(self):
        if len(self.leaf_axes) != len(self.shape):
            raise ValueError(f"{len(self.leaf_axes)} axes are named, {len(self.shape)} there are")
        sizes = self.sizes
        for labels, size in zip(self.leaf_axes, self.shape):
            if math.prod(sizes[label] for label in labels) != size:
                raise ValueError(f"axis {' '.join(labels)} has size {size}, expected {[sizes[x] for x in labels]}")

    left = RenamedMethod("leaf_axes")
    right = RenamedMethod("tensor_axes")
    running = RenamedMethod("index_labels")

    @functools.cached_property
    def leaf_axes(self) -> tuple[tuple[str, ...], ...]:
        """The labels of each axis of the leaf."""
        given = _parse(self.weight.layout)[0] if self.weight.layout else None
        if given is None:
            given = tuple((f"_{axis}",) for axis in range(len(self.shape) - len(self.stacked)))
        return (*((label,) for label in self.stacked), *given)

    @functools.cached_property
    def tensor_axes(self) -> tuple[tuple[str, ...], ...]:
        """The labels of each axis of a tensor."""
        if self.weight.layout:
            return _parse(self.weight.layout)[1]
        return self.leaf_axes[len(self.stacked) :]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The size of each label."""
        words = _placeholders(self.weight.path) | _placeholders(self.weight.name)
        known = {
            label: len(texts) for label, texts in words.items() if texts and label in itertools.chain(*self.leaf_axes)
        }
        for labels, size in zip(self.leaf_axes, self.shape):
            unknown = [label for label in labels if label not in known]
            if len(unknown) > 1:
                raise ValueError(f"the sizes of {' and '.join(unknown)} cannot be told apart")
            for label in unknown:
                known[label] = size // math.prod(known[x] for x in labels if x != label)
        return known

    @functools.cached_property
    def index_labels(self) -> tuple[str, ...]:
        """The labels that run over tensors, in the leaf's order."""
        kept = set(itertools.chain(*self.tensor_axes))
        return tuple(label for label in itertools.chain(*self.leaf_axes) if label not in kept)

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The name of each tensor and where it is: an index for each of `index_labels`."""
        return dict(self._named(self.weight.name))

    @functools.cached_property
    def tied(self) -> dict[str, str]:
        """The names of tied tensors and of the tensors that they are."""
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
    def roles(self) -> tuple[str, ...] | None:
        """The role of each axis of a tensor; None for one that is no factor of a product (a bias, a norm)."""
        ndim = len(self.tensor_axes)
        module = self.weight.module or {0: "", 1: "", 2: "linear"}.get(ndim, "conv")
        if not module:
            return None
        roles = MODULES[module]
        if module == "conv":
            roles += ("in",) * (ndim - 2)
        if len(roles) != ndim:
            raise ValueError(f"{self.path!r}: a tensor of module={module!r} has {len(roles)} axes, not {ndim}")
        return roles

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[label] for label in labels) for labels in self.tensor_axes)

    def resized(self, shape: Sequence[int]) -> "Binding":
        """The same binding of a leaf whose tensor has another size along its first axis."""
        if tuple(shape) == self.tensor_shape:
            return self
        first = self.tensor_axes[0]
        axis = next(i for i, labels in enumerate(self.leaf_axes) if labels == first)
        return dataclasses.replace(self, shape=(*self.shape[:axis], shape[0], *self.shape[axis + 1 :]))

    def _named(self, template: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        words = _placeholders(self.weight.path) | {k: v for k, v in _placeholders(self.weight.name).items() if v}
        for index in itertools.product(*(range(self.sizes[label]) for label in self.index_labels)):
            texts = {
                label: words[label][i] if words.get(label) else str(i) for label, i in zip(self.index_labels, index)
            }
            yield _PLACEHOLDER.sub(lambda found: {**self.fixed, **texts}[found[1]], template), index  # noqa: B023

    def split(self, leaf: Any) -> dict[str, Any]:
        """The tensors of a leaf; views of it where that is possible."""
        flat = list(itertools.chain(*self.leaf_axes))
        order = [*self.index_labels, *itertools.chain(*self.tensor_axes)]
        moved = leaf.reshape([self.sizes[label] for label in flat]).transpose([flat.index(label) for label in order])
        return {name: moved[index].reshape(self.tensor_shape) for name, index in self.tensors.items()}

    def join(self, read: Read, dtype: Any, window: Sequence[slice] | None = None) -> np.ndarray:
        """The leaf, or a part of it, from its tensors.

        No more of the tensors is read than the part needs, and one at a time.

        Args:
          read: `read(name, slices)` gives a part of a tensor.
          dtype: Of the result.
          window: A slice for each axis of the leaf; None for all of it.
        """
        window = [slice(*part.indices(n)) for part, n in zip(window or [slice(None)] * len(self.shape), self.shape)]
        limits = {label: slice(0, size) for label, size in self.sizes.items()}
        limits |= {labels[0]: part for labels, part in zip(self.leaf_axes, window) if len(labels) == 1}

        def length(label: str) -> int:
            return limits[label].stop - limits[label].start

        # An axis of a tensor that is several labels is read for a range of the first of them, then cut.
        ranges = []
        for first, *rest in self.tensor_axes:
            step = math.prod(self.sizes[label] for label in rest)
            ranges.append(slice(limits[first].start * step, limits[first].stop * step))
        read_shape = [n for first, *rest in self.tensor_axes for n in (length(first), *(self.sizes[x] for x in rest))]
        cuts = tuple(cut for first, *rest in self.tensor_axes for cut in (slice(None), *(limits[x] for x in rest)))

        flat = list(itertools.chain(*self.leaf_axes))
        leaf = np.empty([length(label) for label in flat], dtype)
        by_tensor = leaf.transpose(
            [flat.index(label) for label in (*self.index_labels, *itertools.chain(*self.tensor_axes))]
        )
        for name, index in self.tensors.items():
            inside = tuple(i - limits[label].start for label, i in zip(self.index_labels, index))
            if all(0 <= i < length(label) for label, i in zip(self.index_labels, inside)):
                by_tensor[inside] = read(name, tuple(ranges)).reshape(read_shape)[cuts]
        leaf = leaf.reshape([math.prod(map(length, labels)) for labels in self.leaf_axes])
        return leaf[tuple(slice(None) if len(labels) == 1 else part for labels, part in zip(self.leaf_axes, window))]


@functools.cache
def _pattern(path: str) -> re.Pattern:
    """A path with placeholders as a regular expression; a placeholder's whole segment may be absent."""
    parts = []
    for segment in path.split("/"):
        found = _PLACEHOLDER.fullmatch(segment)
        texts = [
            f"(?P<{piece[1]}>{'|'.join(map(re.escape, piece[2].split('|'))) if piece[2] else '[0-9]+'})"
            if piece
            else re.escape(text)
            for text, piece in _pieces(segment)
        ]
        parts.append(f"(?:{''.join(texts)}/)?" if found else "".join(texts) + "/")
    return re.compile("".join(parts).removesuffix("/"))


@functools.cache
def _template(text: str, words: tuple[tuple[str, tuple[str, ...]], ...]) -> re.Pattern:
    """A name with placeholders as a regular expression."""
    known = dict(words)
    texts = [
        (f"(?:{'|'.join(map(re.escape, known[piece[1]]))})" if known.get(piece[1]) else "[0-9]+")
        if piece
        else re.escape(text)
        for text, piece in _pieces(text)
    ]
    return re.compile("".join(texts))


def _pieces(text: str) -> Iterator[tuple[str, re.Match | None]]:
    """Plain text and placeholders, in order."""
    end = 0
    for match in _PLACEHOLDER.finditer(text):
        yield text[end : match.start()], None
        yield match[0], match
        end = match.end()
    yield text[end:], None


def _placeholders(text: str) -> dict[str, tuple[str, ...]]:
    """The placeholders of a path or name with their words; numbers have none."""
    return {m[1]: tuple(m[2].split("|")) if m[2] else () for m in _PLACEHOLDER.finditer(text)}


def _sides(layout: str) -> tuple[list[str], list[str]]:
    if not layout:
        return [], []
    left, right = _parse(layout)
    return list(itertools.chain(*left)), list(itertools.chain(*right))


@functools.cache
def _parse(layout: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The labels of each axis on both sides of a layout."""
    sides = layout.split("->")
    if len(sides) != 2:
        raise ValueError(f"The layout {layout!r} is not of the form 'in out -> out in'.")
    parsed = tuple(
        tuple(tuple(found[1].split() if found[1] is not None else [found[2]]) for found in _AXIS.finditer(side))
        for side in sides
    )
    for side, text in zip(parsed, sides):
        labels = list(itertools.chain(*side))
        if len(set(labels)) != len(labels) or _AXIS.sub("", text).strip():
            raise ValueError(f"The layout {layout!r} is malformed at {text.strip()!r}.")
    return parsed
