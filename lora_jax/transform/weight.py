"""The value that the interpreter carries in place of an adapted weight, and how views act on it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Dims, Factor, Factored, Label, dense
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
    """An operation has no factored form here; its message says why. The weight is merged instead."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A view of a weight and of its adapter's factors. It is a pytree, so it crosses jit, scan, ….

    Attributes:
      value: The base weight under the view; of a quantized one what it takes to compute it.
      factors: See :class:`~lora_jax.adapters.factored.Factored`; labels tie them to the axes of `value`.
      gains: Likewise.
      rate: Dropout rate, or None.
      key: Data of the dropout keys, labeled by the batch axes and `KEY_DATA`; None where no dropout.
      path: The weight's path in the base tree.
      dims: Per axis of `value`, its labels with sizes.
      cut: Labels along which a part was taken by slicing or indexing.
      looked_up: Whether rows were taken by an array of indices.
      scanned: Labels that a scan runs over.
      impl: The PRNG implementation of `key`.
      offset: What a product with the whole weight adds to its result, or None; labels tie it to the axes of `value`.
      inputs: How many elements of the weight such a product sums over for each output.
      taps: Zeros whose gradients are moments of the weight's input (:mod:`lora_jax.transform.taps`); labels tie
        them to the axes of `value`, in axes also by their :func:`twin`.
    """

    value: Value
    factors: tuple[Factor, ...]
    gains: tuple[Factor, ...]
    rate: jax.Array | None
    key: Factor | None
    path: str = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    cut: frozenset[Label] = dataclasses.field(default=frozenset(), metadata={"static": True})
    looked_up: bool = dataclasses.field(default=False, metadata={"static": True})
    scanned: frozenset[Label] = dataclasses.field(default=frozenset(), metadata={"static": True})
    impl: str | None = dataclasses.field(default=None, metadata={"static": True})
    taps: tuple[Factor, ...] = ()
    offset: Factor | None = None
    inputs: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def labels(self) -> tuple[tuple[Label, int], ...]:
        """The labels of all axes in order, with sizes."""
        return tuple(pair for axis in self.dims for pair in axis)

    @property
    def is_adapted(self) -> bool:
        """Whether there is anything beside the base weight (a probe has nothing)."""
        return bool(self.factors or self.gains)

    def merged(self) -> jax.Array:
        """The adapted weight under the view, as an array. (Within :func:`recomputed`.)"""
        value = self.value.compute() if isinstance(self.value, LazyDequantized) else self.value
        return dense(value, self.dims, self.factors, self.gains) if self.is_adapted else value

    def single(self, axis: int) -> Label:
        """The label of an axis that has just one."""
        if len(self.dims[axis]) != 1:
            raise CannotFactor(f"axis {axis} is made of several axes")
        return self.dims[axis][0][0]

    def replace(self, **changes: Any) -> "Weight":
        return dataclasses.replace(self, **changes)

    def map_factors(self, function: Callable[[Factor], Factor], *, key: bool = True) -> "Weight":
        """Applies a function to every labeled array but the base weight itself."""
        return self.replace(
            factors=tuple(map(function, self.factors)),
            gains=tuple(map(function, self.gains)),
            offset=self.offset if self.offset is None else function(self.offset),
            key=function(self.key) if key and self.key is not None else self.key,
            taps=tuple(map(function, self.taps)),
        )

    @property
    def labeled(self) -> tuple[Factor, ...]:
        """Every labeled array but the base weight itself, in the order of :meth:`map_factors`."""
        optional = [factor for factor in (self.offset, self.key) if factor is not None]
        return (*self.factors, *self.gains, *optional, *self.taps)

    def along(self, label: Label, function: Callable[[jax.Array, int], jax.Array]) -> "Weight":
        """Applies `function(array, axis)` to the labeled arrays that have the label."""

        def act(factor: Factor) -> Factor:
            for axis in _axes(factor, label):
                factor = Factor(function(factor.array, axis), factor.labels)
            return factor

        return self.map_factors(act)

    def without(self, label: Label) -> "Weight":
        """Drops a label of size one from the labeled arrays."""

        def drop(factor: Factor) -> Factor:
            gone = _axes(factor, label)
            kept = tuple(x for axis, x in enumerate(factor.labels) if axis not in gone)
            return Factor(lax.squeeze(factor.array, gone), kept) if gone else factor

        return self.map_factors(drop)

    def scaled(self, value: Value, factor: Callable[[jax.Array], jax.Array]) -> "Weight":
        """The weight times a scalar: `value` is the scaled base, `factor` scales one array."""
        if not self.factors:
            return self.replace(value=value)
        first, *rest = self.factors
        offset = None if self.offset is None else Factor(factor(self.offset.array), self.offset.labels)
        return self.replace(value=value, factors=(Factor(factor(first.array), first.labels), *rest), offset=offset)

    def fold_in(self, number: Any) -> "Weight":
        """The weight with other dropout keys, one for each number."""
        if self.key is None:
            return self
        keys = jax.random.wrap_key_data(self.key.array, impl=self.impl)
        folded = jax.random.fold_in
        for _ in range(keys.ndim):
            folded = jax.vmap(folded, in_axes=(0, None))
        return self.replace(key=Factor(jax.random.key_data(folded(keys, number)), self.key.labels))

    def drop_out(self, x: jax.Array) -> jax.Array:
        """Dropout on the input of the low-rank product (scaled up by the rate of what is kept)."""
        if self.key is None or self.rate is None:
            return x
        words = self.key.array.reshape(-1, self.key.array.shape[-1])[0]
        keep = 1.0 - self.rate
        mask = jax.random.bernoulli(jax.random.wrap_key_data(words, impl=self.impl), keep, x.shape)
        return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def _axes(factor: Factor, label: Label) -> list[int]:
    """The axes of a labeled array that follow an axis of the weight."""
    return [factor.axis(name) for name in (label, twin(label)) if name in factor.labels]


def carried(path: str, leaf: Any, form: Factored, dropout_key: jax.Array | None) -> Weight:
    """A weight as it enters the interpreter.

    Args:
      path: Its path in the base tree.
      leaf: The base weight, an array or quantized.
      form: Its adapter's factored form.
      dropout_key: A typed PRNG key of its own, or None.
    """
    dims = form.dims(leaf.shape)
    key, impl = None, None
    if dropout_key is not None and form.dropout is not None and form.factors:
        # Batch axes are the labels that all factors of axes share: each layer and expert has its own mask.
        pairs = [pair for axis in dims for pair in axis]
        tied = [set(f.labels) for f in form.factors if any(label in f.labels for label, _ in pairs)]
        batch = [(label, size) for label, size in pairs if all(label in labels for labels in tied)]
        shape = tuple(size for _, size in batch)
        keys = jax.random.key_data(jax.random.split(dropout_key, shape))
        key, impl = (
            Factor(keys, (*(label for label, _ in batch), KEY_DATA)),
            str(jax.random.key_impl(dropout_key)),
        )
    outputs = () if form.offset is None else form.offset.labels
    return Weight(
        value=LazyDequantized.of(leaf) if is_quantized(leaf) else leaf,
        factors=form.factors,
        gains=form.gains,
        offset=form.offset,
        inputs=value_size([pair for axis in dims for pair in axis if pair[0] not in outputs]),
        rate=form.dropout if key is not None else None,
        key=key,
        path=path,
        dims=dims,
        impl=impl,
    )


def probe(path: str, leaf: Any) -> Weight:
    """A weight without an adapter: to find out how a function uses it, and for quantized leaves."""
    dims = tuple(((str(axis), size),) for axis, size in enumerate(leaf.shape))
    value = LazyDequantized.of(leaf) if is_quantized(leaf) else leaf
    return Weight(value=value, factors=(), gains=(), rate=None, key=None, path=path, dims=dims)


def root(label: Label) -> int | None:
    """The axis of the original weight that a label is (a part of); None for axes that views added."""
    head = label.split(".")[0]
    return int(head) if head.isdigit() else None


def fresh(weight: Weight, count: int) -> list[Label]:
    """Labels that the weight does not use, for axes that a view adds."""
    used = {label for label, _ in weight.labels}
    names = (f"+{number}" for number in range(len(used) + count))
    return [name for name in names if name not in used][:count]


def offset_of(weight: Weight, summed: Sequence[tuple[Label, int]], where: str) -> Factor | None:
    """What a product adds to its result: the weight's offset, if the product sums over all inputs of the weight.

    Args:
      weight: The weight.
      summed: The labels of the axes that are summed, with sizes.
      where: The operation and its source line, for messages.

    Raises:
      ValueError: The product is over a part of the inputs: several of these would add the offset several times.
    """
    if weight.offset is None:
        return None
    others = [label for label, size in summed if size > 1 and (root(label) is None or label in weight.offset.labels)]
    if others or value_size(summed) != weight.inputs:
        raise ValueError(
            f"{weight.path!r}: the adapter adds a bias to the outputs, so its weight takes a product over all of its "
            f"{weight.inputs} inputs and nothing else; {where} sums over {value_size(summed)} elements"
            f"{', of other axes too' if others else ''}. Multiply the whole weight with its input, or load the adapter "
            "on a base whose layer has a bias (of zeros): lora_jax.peft.load then adds the adapter's bias to that one."
        )
    return weight.offset


def permuted(weight: Weight, value: Value, order: Sequence[int]) -> Weight:
    """A transposed view."""
    return weight.replace(value=value, dims=tuple(weight.dims[axis] for axis in order))


def reshaped(weight: Weight, value: Value) -> Weight:
    """A reshaped view: axes are merged and split along the borders of labels, which are cut where needed."""
    weight, plan = _split_labels(weight, value.shape)
    for label, size in weight.labels:
        if size == 1 and not any(label == kept for axis in plan for kept, _ in axis):
            weight = weight.without(label)
    added = iter(fresh(weight, sum(not axis for axis in plan)))
    dims = tuple(axis or ((next(added), 1),) for axis in plan)
    return weight.replace(value=value, dims=dims)


def _split_labels(weight: Weight, shape: Sequence[int]) -> tuple[Weight, list[tuple[tuple[Label, int], ...]]]:
    """Cuts labels so that each axis of `shape` is a run of labels; axes of size one get no label."""
    queue = [pair for pair in weight.labels if pair[1] != 1]
    plan: list[tuple[tuple[Label, int], ...]] = []
    for size in shape:
        axis: list[tuple[Label, int]] = []
        while size != 1:
            label, have = queue.pop(0)
            if size % have == 0:
                axis.append((label, have))
                size //= have
            elif have % size == 0:
                weight, parts = split_label(weight, label, size, have // size)
                axis.append(parts[0])
                queue.insert(0, parts[1])
                size = 1
            else:
                raise CannotFactor(f"the reshape to {tuple(shape)} cuts across an axis of size {have}")
        plan.append(tuple(axis))
    return weight, plan


def split_label(weight: Weight, label: Label, major: int, minor: int):
    """Splits a label in two, in the labeled arrays and in the dims."""
    parts = ((f"{label}.0", major), (f"{label}.1", minor))
    names = {label: [name for name, _ in parts], twin(label): [twin(name) for name, _ in parts]}

    def cut(factor: Factor) -> Factor:
        labels = tuple(new for old in factor.labels for new in names.get(old, [old]))
        if len(labels) == len(factor.labels):
            return factor
        shape = [n for old, size in factor.sizes.items() for n in ((major, minor) if old in names else (size,))]
        return Factor(lax.reshape(factor.array, shape), labels)

    dims = tuple(tuple(new for old in axis for new in (parts if old[0] == label else (old,))) for axis in weight.dims)
    rename = {label: parts[0][0]}
    marks = {
        "cut": frozenset(rename.get(x, x) for x in weight.cut),
        "scanned": frozenset(rename.get(x, x) for x in weight.scanned),
    }
    return weight.map_factors(cut).replace(dims=dims, **marks), parts


def sliced(weight: Weight, value: Value, axis: int, start: int, limit: int, stride: int = 1) -> Weight:
    """A view of a static slice along one axis."""
    labels = weight.dims[axis]
    size = limit - start
    if len(labels) > 1:
        # A fused axis: whole blocks, or a part of one block.
        (block, _), *rest = labels
        inner = value_size(rest)
        if stride != 1 or len(rest) != 1:
            raise CannotFactor(f"a strided slice of axis {axis}, which is made of several axes")
        if start % inner == 0 and size % inner == 0:
            return _cut_range(weight, value, axis, block, start // inner, limit // inner, 1, rest)
        if start // inner == (limit - 1) // inner:
            first = start // inner
            weight = _cut_range(weight, value, axis, block, first, first + 1, 1, rest)
            offset = first * inner
            return _cut_range(weight, value, axis, rest[0][0], start - offset, limit - offset, 1, [])
        raise CannotFactor(f"the slice {start}:{limit} of axis {axis} cuts across its blocks")
    return _cut_range(weight, value, axis, labels[0][0], start, limit, stride, [])


def value_size(pairs: Sequence[tuple[Label, int]]) -> int:
    """The size of an axis made of these labels."""
    size = 1
    for _, part in pairs:
        size *= part
    return size


def _cut_range(weight, value, axis, label, start, limit, stride, rest) -> Weight:
    cut = weight.along(label, lambda array, at: lax.slice_in_dim(array, start, limit, stride, at))
    size = -(-(limit - start) // stride)
    pairs = ((label, size), *rest)
    if len(weight.dims[axis]) > 1 and not rest:  # the block before it has been cut to one
        pairs = tuple((x, size if x == label else n) for x, n in weight.dims[axis])
    dims = (*weight.dims[:axis], pairs, *weight.dims[axis + 1 :])
    return cut.replace(value=value, dims=dims, cut=weight.cut | {label})


def spec_by_label(weight: Weight, spec: Sequence[Any], mesh: Any) -> dict[Label, Any]:
    """The mesh axes of each label, from a partition spec of the base weight."""
    found = {}
    for axis, names in zip(weight.dims, spec):
        if names is None:
            continue
        ways = 1
        for name in names if isinstance(names, tuple) else (names,):
            ways *= mesh.shape[name]
        label, size = axis[0]
        if len(axis) > 1 and size % ways:
            raise CannotFactor(f"an axis made of several is sharded {ways} ways, its first part has size {size}")
        found[label] = names
    return found
