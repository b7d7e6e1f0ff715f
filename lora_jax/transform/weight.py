"""The value that the interpreter carries in place of a weight, or of a linear expression of several weights."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Dims, Factor, Factored, Label, OnOutput, dense, is_factor
from lora_jax.adapters.protocol import IN, OUT
from lora_jax.leaves import is_quantized
from lora_jax.transform.lazy_dequantized import LazyDequantized

Value = jax.Array | LazyDequantized
"""The base weight under a view, or what it takes to compute it."""

KEY_DATA = "#key"
"""Label of the words of a PRNG key, which is carried like a factor of the weight's batch axes."""


def twin(label: Label) -> Label:
    """The second label of an axis, in an array that has the axis twice (a second moment)."""
    return f"{label}'"


class CannotFactor(Exception):
    """An operation has no factored form here; its message says why. The weight is merged instead.

    Args:
      reason: Why.
      roles: By label of the weight, the roles of its axes, if the operation shows them all the same.
      of_input: Whether these are roles of a product with an input.
    """

    def __init__(self, reason: str, roles: Mapping[Label, str] = MappingProxyType({}), *, of_input: bool = True):
        super().__init__(reason)
        self.roles, self.of_input = roles, of_input


@dataclasses.dataclass(frozen=True)
class Source:
    """A leaf of the base, and how the axes of a view relate to its axes. Static.

    Attributes:
      path: Path of the leaf.
      axes: For labels of the view, the axis of the leaf that they are a part of (or several, which an array mixes).
        Parts of a label (`"1.0"`) have its axes; labels that views add have none.
      sliced: Axes of the leaf of which a part was sliced or indexed.
      scanned: Axes of the leaf that a scan runs over.
      looked_up: Whether rows were gathered by an array of indices.
      roles: The adapter's role of each axis of the leaf, if it has roles.
    """

    path: str
    axes: tuple[tuple[Label, int], ...]
    sliced: frozenset[int] = frozenset()
    scanned: frozenset[int] = frozenset()
    looked_up: bool = False
    roles: tuple[str, ...] = ()

    def axes_of(self, label: Label) -> frozenset[int]:
        """The axes of the leaf that a label is (a part of); none for a label that a view added."""
        while label and all(label != name for name, _ in self.axes):
            label = label.rpartition(".")[0]
        return frozenset(axis for name, axis in self.axes if name == label)

    def axis(self, label: Label) -> int | None:
        """The first of :meth:`axes_of`, or None."""
        return min(self.axes_of(label), default=None)

    def renamed(self, names: Mapping[Label, Label]) -> "Source":
        """The same relation for other labels. `names` has every label of the view."""
        axes = ((new, axis) for old, new in names.items() for axis in sorted(self.axes_of(old)))
        return dataclasses.replace(self, axes=tuple(axes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the input of a low-rank product.

    Attributes:
      rate: A scalar.
      key: Data of the PRNG keys, labeled by batch axes and `KEY_DATA`.
      impl: PRNG implementation of the key.
    """

    rate: Factor
    key: Factor
    impl: str = dataclasses.field(metadata={"static": True})

    def fold_in(self, number: Any) -> "Dropout":
        """The same dropout with other keys, one for each number."""
        keys = jax.random.wrap_key_data(self.key.array, impl=self.impl)
        folded = jax.random.fold_in
        for _ in range(keys.ndim):
            folded = jax.vmap(folded, in_axes=(0, None))
        return dataclasses.replace(self, key=Factor(jax.random.key_data(folded(keys, number)), self.key.labels))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drops entries of an input and scales up the others."""
        words = self.key.array.reshape(-1, self.key.array.shape[-1])[0]
        keep = 1.0 - self.rate.array
        mask = jax.random.bernoulli(jax.random.wrap_key_data(words, impl=self.impl), keep, x.shape)
        return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """What one adapter adds to a :class:`Weight`. Labels tie its arrays to the axes of the weight's value.

    Attributes:
      factors: Their product over the labels that no axis has is the term; none for a weight without an adapter.
      dropout: On the input of the low-rank product, or None.
      offset: What a product with the whole weight adds to its result, or None.
      on_output: The function of the output of a product with the whole weight that is added to it, or None.
      taps: Zeros whose gradients are moments of the weight's input (:mod:`lora_jax.transform.taps`); in axes are
        labeled also by their :func:`twin`.
      sources: The leaf of the base that the adapter is of; several if like adapters were stacked.
      inputs: How many elements of the weight a product with an offset or `on_output` sums over for each output.
      outputs: How many outputs such a product with `on_output` has for each input.
      merge: While roles are traced: index of the recorded use in which the adapter was merged. A term with one has
        no arrays, and serves to find roles behind that operation.
    """

    factors: tuple[Factor, ...] = ()
    dropout: Dropout | None = None
    offset: Factor | None = None
    on_output: OnOutput | None = None
    taps: tuple[Factor, ...] = ()
    sources: tuple[Source, ...] = dataclasses.field(default=(), metadata={"static": True})
    inputs: int = dataclasses.field(default=1, metadata={"static": True})
    outputs: int = dataclasses.field(default=1, metadata={"static": True})
    merge: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def path(self) -> str:
        """The path of the leaf, for messages of several leaves."""
        return ", ".join(source.path for source in self.sources)

    @property
    def sliced(self) -> bool:
        return any(source.sliced for source in self.sources)

    @property
    def looked_up(self) -> bool:
        return any(source.looked_up for source in self.sources)

    def replace(self, **changes: Any) -> "Term":
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """`gains ⊙ (value + terms[0] + terms[1] + …)`: weights under views. It is a pytree, so it crosses jit, scan, ….

    Attributes:
      value: The base weight under the view, or the same expression of several base weights.
      terms: What the adapters add, one term for each.
      gains: Multiply the sum; see :class:`~lora_jax.adapters.factored.Factored`.
      dims: Per axis of `value`, its labels with sizes.
    """

    value: Value
    terms: tuple[Term, ...]
    gains: tuple[Factor, ...] = ()
    dims: Dims = dataclasses.field(default=(), metadata={"static": True})

    @property
    def labels(self) -> tuple[tuple[Label, int], ...]:
        """The labels of all axes in order, with sizes."""
        return tuple(pair for axis in self.dims for pair in axis)

    @property
    def is_adapted(self) -> bool:
        """Whether there is anything beside the base weight (a probe has nothing)."""
        return bool(self.gains or any(term.factors or term.on_output is not None for term in self.terms))

    @property
    def has_taps(self) -> bool:
        return any(term.taps for term in self.terms)

    @property
    def is_merged(self) -> bool:
        """Whether `value` includes all adapters already, and the terms only serve to find roles."""
        return all(term.merge is not None for term in self.terms)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes of a leaf, of which one may be contracted."""
        labels = [label for label, size in self.labels if size > 1]
        return any(sum(bool(s.axes_of(label)) for label in labels) > 1 for term in self.terms for s in term.sources)

    @property
    def sliced(self) -> bool:
        return any(term.sliced for term in self.terms)

    @property
    def looked_up(self) -> bool:
        return any(term.looked_up for term in self.terms)

    def merged(self) -> jax.Array:
        """The adapted weight under the view, as an array. (Within :func:`recomputed`.)"""
        value = self.value.compute() if isinstance(self.value, LazyDequantized) else self.value
        terms = [term.factors for term in self.terms if term.factors]
        return dense(value, self.dims, terms, self.gains) if self.is_adapted else value

    def single(self, axis: int) -> Label:
        """The label of an axis that has just one."""
        if len(self.dims[axis]) != 1:
            raise CannotFactor(f"axis {axis} is made of several axes")
        return self.dims[axis][0][0]

    def replace(self, **changes: Any) -> "Weight":
        return dataclasses.replace(self, **changes)

    def with_axis(self, axis: int, pairs: Sequence[tuple[Label, int]]) -> "Weight":
        """The weight with other labels on one axis."""
        return self.replace(dims=(*self.dims[:axis], tuple(pairs), *self.dims[axis + 1 :]))

    def map_factors(
        self, function: Callable[[Factor], Factor], of_gain: Callable[[Factor], Factor] | None = None
    ) -> "Weight":
        """Applies a function to every labeled array, and another one (if there is one) to gains."""
        return self.replace(
            terms=jax.tree.map(function, self.terms, is_leaf=is_factor),
            gains=tuple(map(of_gain or function, self.gains)),
        )

    @property
    def labeled(self) -> list[Factor]:
        """Every labeled array, in the order of :meth:`map_factors`."""
        return [*jax.tree.leaves(self.terms, is_leaf=is_factor), *self.gains]

    def axes_of(self, label: Label) -> frozenset[int]:
        """The axes of leaves that a label is (a part of); none for a label that a view added."""
        return frozenset().union(*(source.axes_of(label) for term in self.terms for source in term.sources))

    def map_sources(self, function: Callable[[Source], Source]) -> "Weight":
        """Applies a function to every source."""
        terms = (term.replace(sources=tuple(map(function, term.sources))) for term in self.terms)
        return self.replace(terms=tuple(terms))

    def link(self, pairs: Sequence[tuple[Label, Label]]) -> "Weight":
        """Relates labels that a view adds to the axes of the leaves that other labels belong to: `(new, other)`."""

        def link_source(source: Source) -> Source:
            new = tuple((name, axis) for name, label in pairs for axis in sorted(source.axes_of(label)))
            return dataclasses.replace(source, axes=(*source.axes, *new))

        return self.map_sources(link_source)

    def _check_part(self, label: Label) -> None:
        """Raises `CannotFactor` for a part of joined weights whose inputs are read: each tap would count all inputs."""
        for term in self.terms if len(self.terms) > 1 else ():
            if term.taps and label not in term.taps[0].labels:
                raise CannotFactor("a part of several joined weights has inputs of its own")

    def mark_sliced(self, label: Label, *, looked_up: bool = False) -> "Weight":
        """Marks the axis of a label as sliced or indexed."""
        self._check_part(label)

        def mark(source: Source) -> Source:
            axes = source.sliced | source.axes_of(label)
            return dataclasses.replace(source, sliced=axes, looked_up=source.looked_up or looked_up)

        return self.map_sources(mark)

    def mark_scanned(self, label: Label) -> "Weight":
        """Marks the axis of a label as one that a scan runs over."""
        self._check_part(label)

        def mark(source: Source) -> Source:
            axes = source.axes_of(label)
            return dataclasses.replace(source, sliced=source.sliced - axes, scanned=source.scanned | axes)

        return self.map_sources(mark)

    def along(
        self,
        label: Label,
        function: Callable[[jax.Array, int], jax.Array],
        of_gain: Callable[[jax.Array, int], jax.Array] | None = None,
    ) -> "Weight":
        """Applies `function(array, axis)` to the labeled arrays that have the label; `of_gain` to gains."""

        def act(function: Callable[[jax.Array, int], jax.Array]) -> Callable[[Factor], Factor]:
            def act_on(factor: Factor) -> Factor:
                for axis in _axes(factor, label):
                    factor = Factor(function(factor.array, axis), factor.labels)
                return factor

            return act_on

        return self.map_factors(act(function), act(of_gain or function))

    def without(self, label: Label) -> "Weight":
        """Drops a label of size one from the labeled arrays."""

        def drop(factor: Factor) -> Factor:
            axes = _axes(factor, label)
            rest = tuple(x for axis, x in enumerate(factor.labels) if axis not in axes)
            return Factor(lax.squeeze(factor.array, axes), rest) if axes else factor

        return self.map_factors(drop)

    def scaled(self, value: Value, scale: Callable[[jax.Array], jax.Array]) -> "Weight":
        """The weight times a scalar: `value` is the scaled base, `scale` scales one array."""

        def scale_term(term: Term) -> Term:
            if not term.factors:
                return term
            first, *rest = term.factors
            offset = None if term.offset is None else Factor(scale(term.offset.array), term.offset.labels)
            return term.replace(factors=(Factor(scale(first.array), first.labels), *rest), offset=offset)

        return self.replace(value=value, terms=tuple(map(scale_term, self.terms)))


def _axes(factor: Factor, label: Label) -> list[int]:
    """The axes of a labeled array that follow an axis of the weight."""
    return [factor.axis(name) for name in (label, twin(label)) if name in factor.labels]


def make_weight(path: str, leaf: Any, form: Factored, roles: tuple[str, ...], dropout_key: jax.Array | None) -> Weight:
    """Returns an adapted leaf of the base as the interpreter carries it.

    Args:
      path: Path of the leaf in the base tree.
      leaf: The base weight, an array or quantized.
      form: The factored form of its adapter.
      roles: The adapter's role of each axis, if it has roles.
      dropout_key: A typed PRNG key for this path, or None.
    """
    dims = form.dims(leaf.shape)
    pairs = [pair for axis in dims for pair in axis]
    dropout = None
    if dropout_key is not None and form.dropout is not None and form.factors:
        # Batch axes are the labels that all factors of axes share: each layer and expert has its own mask.
        tied = [set(f.labels) for f in form.factors if any(label in f.labels for label, _ in pairs)]
        batch = [(label, size) for label, size in pairs if all(label in labels for labels in tied)]
        keys = jax.random.key_data(jax.random.split(dropout_key, tuple(size for _, size in batch)))
        key = Factor(keys, (*(label for label, _ in batch), KEY_DATA))
        dropout = Dropout(Factor(form.dropout, ()), key, str(jax.random.key_impl(dropout_key)))
    roles = tuple(roles) if len(roles) == len(dims) else ()
    term = Term(
        factors=form.factors,
        dropout=dropout,
        offset=form.offset,
        on_output=form.on_output,
        sources=(Source(path, _label_axes(dims), roles=roles),),
        inputs=value_size(pair for axis, role in zip(dims, roles) if role == IN for pair in axis),
        outputs=value_size(pair for axis, role in zip(dims, roles) if role == OUT for pair in axis),
    )
    return Weight(_value(leaf), (term,), form.gains, dims)


def probe(path: str, leaf: Any) -> Weight:
    """A weight without an adapter: to find out how a function uses it, and for quantized leaves."""
    dims = tuple(((str(axis), size),) for axis, size in enumerate(leaf.shape))
    return Weight(_value(leaf), (Term(sources=(Source(path, _label_axes(dims)),)),), dims=dims)


def _value(leaf: Any) -> Value:
    return LazyDequantized.of(leaf) if is_quantized(leaf) else leaf


def _label_axes(dims: Dims) -> tuple[tuple[Label, int], ...]:
    return tuple((label, axis) for axis, pairs in enumerate(dims) for label, _ in pairs)


def value_size(pairs: Iterable[tuple[Label, int]]) -> int:
    """The size of an axis made of these labels."""
    size = 1
    for _, part in pairs:
        size *= part
    return size
