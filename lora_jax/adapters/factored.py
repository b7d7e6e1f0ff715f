"""Labeled tensors: the factored form of an adapted weight, and its contraction without merging.

An adapted weight is `gains ⊙ (W + factors[0] · factors[1] · …)`. An offset, if there is one, is added to the product of
an input with the sum. Every axis of every factor carries a label. Labels that name an axis of W tie the factor to it,
the others (the rank) are bonds that are summed. Slicing, transposing, reshaping or scanning over W then only renames or
slices labels, and a contraction with an input is a chain of small products that starts from the input.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Label = str
Dims = tuple[tuple[tuple[Label, int], ...], ...]
"""Per axis of a weight, the labels that make it up (the slowest first) with their sizes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array with a label for each of its axes."""

    array: jax.Array
    labels: tuple[Label, ...] = dataclasses.field(metadata={"static": True})

    @property
    def sizes(self) -> dict[Label, int]:
        return dict(zip(self.labels, self.array.shape))

    def axis(self, label: Label) -> int:
        return self.labels.index(label)

    def transposed(self, labels: Sequence[Label]) -> "Factor":
        """The same factor with its axes in the order of `labels`."""
        order = [self.axis(label) for label in labels]
        if order == list(range(len(order))):
            return self
        return Factor(lax.transpose(self.array, order), tuple(labels))


class OnOutput(Protocol):
    """A function of the output of a product; it need not be linear.

    It is a pytree of :class:`Factor`, which have labels of batch and out axes of the weight, and bonds. With zeros in
    all of them it returns zeros.

    Attributes:
      description: What becomes of an output y, for :func:`lora_jax.explain`.
    """

    @property
    def description(self) -> str: ...

    def __call__(self, y: Factor, precision: Any) -> Factor:
        """What is added to an output.

        Args:
          y: The output. It has the labels of the weight's out axes (of their parts, if a view divided them) and batch
            axes, and others for tokens, in any order.
          precision: Of the product, for products with factors.

        Returns:
          A factor with the labels and sizes of `y`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Factored:
    """The adapted weight as labeled tensors.

    Attributes:
      labels: Per axis of the weight, the labels that make it up, the slowest first. One label is the
        rule; a fused axis has several (`("block", "1")`).
      factors: Their product over the labels that no axis has is added to the weight. May be empty.
      gains: Multiply the sum; each factor's labels are all labels of axes.
      offset: Added to each product of an input with the sum, before the gains that multiply outputs; its labels are
        those of the axes that the product does not sum over. Only beside factors. A weight with one cannot be merged.
      dropout: Rate of the dropout on the input of the product with `factors`, a scalar; None for none.
      on_output: A function of the output of each product, after the bias that follows it; what it returns is added to
        the output. See :class:`OnOutput`. A weight with one cannot be merged.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = Factor(jnp.ones((2, 4)), ("rank", "0")), Factor(jnp.ones((2, 3)), ("rank", "1"))
      >>> Factored(labels=(("0",), ("1",)), factors=(a, b)).dims((4, 3))
      ((('0', 4),), (('1', 3),))
    """

    labels: tuple[tuple[Label, ...], ...]
    factors: tuple[Factor, ...] = ()
    gains: tuple[Factor, ...] = ()
    dropout: jax.Array | None = None
    offset: Factor | None = None
    on_output: "OnOutput | None" = None

    def __post_init__(self):
        if self.offset is not None and not self.factors:
            raise ValueError("An offset is added beside factors; this form has none.")

    def dims(self, shape: Sequence[int]) -> Dims:
        """The labels of each axis of a weight of this shape, with their sizes."""
        arrays = (*self.factors, *self.gains, *(() if self.offset is None else (self.offset,)))
        sizes = {label: size for f in arrays for label, size in f.sizes.items()}
        dims = []
        for labels, size in zip(self.labels, shape):
            unknown = [label for label in labels if label not in sizes]
            if len(unknown) == 1:
                rest = math.prod(sizes[label] for label in labels if label in sizes)
                sizes[unknown[0]] = size // rest
            dims.append(tuple((label, sizes[label]) for label in labels))
        return tuple(dims)


def check_form(form: Any, owner: str) -> None:
    """Raises an error unless a factored form is a :class:`Factored` with labels that fit together.

    Args:
      form: What `factored()` returned.
      owner: The name of the adapter's class, for the message.

    Raises:
      TypeError: It is not a `Factored`.
      ValueError: A factor has more or fewer labels than axes, or one that neither the weight nor another factor has.
    """
    if not isinstance(form, Factored):
        raise TypeError(f"{owner}.factored() returned {type(form).__name__}; expected self.form(factor, …) or None.")
    counts = collections.Counter(label for factor in form.factors for label in set(factor.labels))
    axes = [label for labels in form.labels for label in labels]
    on_output = jax.tree.leaves(form.on_output, is_leaf=is_factor)
    if not all(map(is_factor, on_output)):
        raise TypeError(f"{owner}.factored(): the arrays of on_output are those of factors, self.factor(name).")
    for factor in (*form.factors, *form.gains, *on_output):
        if len(factor.labels) != jnp.ndim(factor.array):
            shape = jnp.shape(factor.array)
            raise ValueError(f"{owner}.factored(): a factor of shape {shape} has the labels {factor.labels}.")
    for factor in (*form.factors, *form.gains):
        for label in factor.labels:
            if label not in axes and counts[label] < 2:
                raise ValueError(
                    f"{owner}.factored(): only one factor has the label {label!r}, which is not an axis of the weight "
                    f"({', '.join(axes)}). A summed label occurs in at least two factors; the labels of the factors "
                    f"are {', '.join(str(factor.labels) for factor in form.factors)}."
                )


def is_factor(node: Any) -> bool:
    """Whether a node of a tree is a factor."""
    return isinstance(node, Factor)


def compute_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype that merges are computed in: at least float32."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize > 4 else jnp.dtype(jnp.float32)


def _cheapest_order(start: Factor, factors: Sequence[Factor], out: Sequence[Label]) -> list[Factor]:
    """The order of products, each with the running result, that takes the fewest multiplications."""
    sizes = {label: size for factor in (start, *factors) for label, size in factor.sizes.items()}
    everything = range(len(factors))

    def running(done: Collection[int]) -> set[Label]:
        """The labels of the result after some of the products, in whatever order."""
        later = set(out).union(*(factors[i].labels for i in everything if i not in done))
        return later.intersection(set(start.labels).union(*(factors[i].labels for i in done)))

    best: dict[frozenset[int], tuple[int, tuple[int, ...]]] = {frozenset(): (0, ())}
    for count in everything:
        for done in map(frozenset, itertools.combinations(everything, count + 1)):
            options = []
            for last in sorted(done):
                before = done - {last}
                labels = set(start.labels) if not before else running(before)
                cost = math.prod(sizes[label] for label in labels.union(factors[last].labels))
                options.append((best[before][0] + cost, (*best[before][1], last)))
            best[done] = min(options)
    return [factors[i] for i in best[frozenset(everything)][1]]


def explicit_sharding(array: Any) -> NamedSharding | None:
    """The sharding in an array's type under a mesh with explicit axes; None elsewhere."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def placed(array: jax.Array, sharding: NamedSharding | None, shape: Sequence[int] | None = None) -> jax.Array:
    """An array in another shape and, under a mesh with explicit axes, with this sharding."""
    if shape is not None and tuple(array.shape) != tuple(shape):
        return lax.reshape(array, shape, out_sharding=sharding)
    return array if sharding is None or explicit_sharding(array) == sharding else jax.reshard(array, sharding)


def _product_sharding(labels: Sequence[Label], places: Mapping[Label, Any], has_all: bool, *operands: Factor):
    """The sharding of a product under a mesh with explicit axes (None elsewhere)."""
    shardings = [(operand, explicit_sharding(operand.array)) for operand in operands]
    meshes = [sharding.mesh for _, sharding in shardings if sharding is not None]
    if not meshes:
        return None
    by_label: dict[Label, Any] = {}
    for operand, sharding in shardings:
        spec = (*sharding.spec, *[None] * operand.array.ndim) if sharding is not None else ()
        for label, axis in zip(operand.labels, spec):
            by_label[label] = by_label.get(label) or axis
    by_label |= places if has_all else {label: by_label.get(label) or names for label, names in places.items()}
    used: set[str] = set()
    entries = []
    for label in labels:
        axis = by_label.get(label)
        names: set[str] = set(axis) if isinstance(axis, tuple) else set() if axis is None else {axis}
        entries.append(None if names & used else axis)
        used |= names
    return NamedSharding(meshes[0], PartitionSpec(*entries))


def _dot(
    left: Factor, right: Factor, later: Iterable[Label], places: Mapping[Label, Any], has_all: bool, precision, dtype
) -> Factor:
    later = set(later)
    shared = [label for label in left.labels if label in right.labels]
    batch = [label for label in shared if label in later]
    summed = [label for label in shared if label not in later]
    labels = (
        *batch,
        *(label for label in left.labels if label not in shared),
        *(label for label in right.labels if label not in shared),
    )

    def axes(operand: Factor, group: list[Label]) -> list[int]:
        return [operand.axis(label) for label in group]

    product = lax.dot_general(
        left.array,
        right.array,
        ((axes(left, summed), axes(right, summed)), (axes(left, batch), axes(right, batch))),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=_product_sharding(labels, places, has_all, left, right),
    )
    return Factor(product, labels)


def chain(
    start: Factor,
    factors: Sequence[Factor],
    out: Sequence[tuple[Label, int]],
    *,
    precision=None,
    dtype: jax.typing.DTypeLike | None = None,
    reverse: bool = False,
    places: Mapping[Label, Any] | None = None,
) -> jax.Array:
    """Multiplies `start` by one factor after another, in the cheapest order.

    Because each product has the running result as an operand, no product of two factors (which would
    be as large as the weight) is ever formed on the way from an input to an output.

    Args:
      start: The input. Labels that neither `out` nor a factor has are summed.
      factors: Cast to the dtype of `start`. One whose labels all stay (a diagonal) is multiplied elementwise, as
        gains are (:func:`times`).
      out: Labels and sizes of the result's axes, in order. A label that nothing has is broadcast.
      precision: The precision of each product, as for `jax.lax.dot_general`.
      dtype: The dtype of the result; None for the dtype of `start`.
      reverse: Puts the factor on the left of each product, so that its axes come first.
      places: Under a mesh with explicit axes: the mesh axes (or None) of labels of the result; other labels have the
        operands' mesh axes. Products before the last one are sharded like the input or the result, so that only arrays
        as wide as the rank are communicated.

    Returns:
      The result, with the axes that `out` names.
    """
    names = [label for label, _ in out]
    used = {*names, *(label for factor in factors for label in factor.labels)}
    lone = [index for index, label in enumerate(start.labels) if label not in used]
    if lone:
        start = Factor(jnp.sum(start.array, axis=tuple(lone)), tuple(x for x in start.labels if x in used))
    result, order = start, _cheapest_order(start, factors, names)
    for index, factor in enumerate(order):
        later = {*names, *(label for f in order[index + 1 :] for label in f.labels)}
        if set(factor.labels) <= later & set(result.labels):  # a diagonal: nothing is summed
            result = Factor(times(result.array, factor, list(result.sizes.items())), result.labels)
            continue
        factor = Factor(narrow_dtype(factor.array, start.array.dtype), factor.labels)
        is_last = index == len(order) - 1
        has_all = all(set(f.labels) <= set(names) for f in order[index + 1 :])  # but for diagonals
        pair = (factor, result) if reverse else (result, factor)
        result = _dot(*pair, later, places or {}, has_all, precision, dtype if is_last else None)
    result = result.transposed([label for label in names if label in result.labels])
    array = result.array if dtype is None else result.array.astype(dtype)
    if len(result.labels) == len(out):
        return array
    axes = [index for index, label in enumerate(names) if label in result.labels]
    return lax.broadcast_in_dim(array, [size for _, size in out], axes)


def narrow_dtype(array: jax.Array, dtype: Any) -> jax.Array:
    """A factor in the dtype of the product that takes it.

    If a loop over layers reads a float32 stack only in bfloat16, XLA for TPUs converts the stack before the loop and
    stores both. Rounding by an operation of its own and casting behind a barrier, with the same results, avoids that.

    Raises:
      TypeError: The factor is complex, and the product is real.
    """
    wide, narrow = jnp.finfo(array.dtype), jnp.finfo(dtype)
    if narrow.bits < wide.bits and narrow.nexp == wide.nexp:  # (fewer exponents would lose subnormal numbers)
        array = lax.optimization_barrier(lax.reduce_precision(array, int(narrow.nexp), int(narrow.nmant)))
    return _cast(array, dtype)


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    """An array in a dtype; raises `TypeError` if that would drop an imaginary part."""
    if jnp.iscomplexobj(array) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"A factor of dtype {array.dtype} cannot act on an array of dtype {jnp.dtype(dtype)}.")
    return array.astype(dtype)


def dense(weight: jax.Array, dims: Dims, terms: Sequence[Sequence[Factor]], gains: Sequence[Factor]) -> jax.Array:
    """The adapted weight itself, computed in at least float32 and cast to the weight's dtype.

    Args:
      weight: The base weight.
      dims: The labels of its axes.
      terms: Each a product of factors that is added to the weight.
      gains: Multiply the sum.
    """
    labels = [pair for axis in dims for pair in axis]
    dtype = compute_dtype(weight.dtype)
    total = weight.astype(dtype)
    for factors in terms:
        first, *rest = (Factor(_cast(factor.array, dtype), factor.labels) for factor in factors)
        change = chain(first, rest, labels, precision=lax.Precision.HIGHEST)
        total = total + placed(change, explicit_sharding(weight), weight.shape)
    for gain in gains:
        total = times(total, gain, labels)
    return total.astype(weight.dtype)


def times(array: jax.Array, gain: Factor, labels: Sequence[tuple[Label, int]]) -> jax.Array:
    """An array whose axes are `labels`, grouped in any way, times a gain: in at least float32, then its own dtype.

    Multiplying costs little compared with the product that computed the array; in bfloat16 the gain's gradient, a sum
    over all tokens, would lose several of its eight bits.
    """
    return _elementwise(jnp.multiply, array, gain, labels)


def plus(array: jax.Array, offset: Factor, labels: Sequence[tuple[Label, int]]) -> jax.Array:
    """An array whose axes are `labels`, grouped in any way, plus an offset: in at least float32, as :func:`times`."""
    return _elementwise(jnp.add, array, offset, labels)


def _elementwise(
    operation: Callable[[jax.Array, jax.Array], jax.Array],
    array: jax.Array,
    factor: Factor,
    labels: Sequence[tuple[Label, int]],
) -> jax.Array:
    wide = compute_dtype(array.dtype)
    whole_axes = len(labels) == array.ndim
    sharding = explicit_sharding(array)
    other = placed(spread(factor, labels, wide, sharding if whole_axes else None), sharding, array.shape)
    return operation(array.astype(wide), other).astype(array.dtype)


def spread(
    gain: Factor,
    labels: Sequence[tuple[Label, int]],
    dtype: jax.typing.DTypeLike,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """A gain broadcast to the axes that `labels` names, in their order.

    Under a mesh with explicit axes it has the sharding of the array that it multiplies: its gradient is then reduced
    with the product's sharding, without an all-gather.
    """
    names = [label for label, _ in labels]
    gain = gain.transposed([label for label in names if label in gain.labels])
    axes = [names.index(label) for label in gain.labels]
    array = _cast(gain.array, dtype)
    if sharding is not None:
        spec = PartitionSpec(*(sharding.spec[axis] for axis in axes))
        array = placed(array, NamedSharding(sharding.mesh, spec))
    return lax.broadcast_in_dim(array, [size for _, size in labels], axes, out_sharding=sharding)


def folded(factors: Sequence[Factor]) -> list[Factor]:
    """The same product of fewer factors: one whose labels are a subset of another's is multiplied into it."""
    remaining, result = sorted(factors, key=lambda factor: len(factor.labels)), []
    while remaining:
        small = remaining.pop(0)
        index = next((i for i, large in enumerate(remaining) if set(small.labels) <= set(large.labels)), None)
        if index is None:
            result.append(small)
        else:
            large = remaining[index]
            remaining[index] = Factor(times(large.array, small, list(large.sizes.items())), large.labels)
    return result
