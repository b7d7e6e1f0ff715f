"""The driver of contractions: everything that is the same for each operation that multiplies an input with a weight.

A rule states which axes an operation contracts (:class:`Contraction`). The driver applies gains, reads taps, computes
the product with the base weight, dropout and the low-rank products, and records the use: `x·W + ((x·a)·b)`, never
`x·(W + a·b)`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters import factored
from lora_jax.adapters.factored import Factor, Label, explicit_sharding, folded, narrowed, placed, plus, times
from lora_jax.transform import jaxprs
from lora_jax.transform.lazy_dequantized import product
from lora_jax.transform.members import chain, picked
from lora_jax.transform.product import Product
from lora_jax.transform.rules.registry import Evaluator, Rule, rule
from lora_jax.transform.taps import Moments, check_whole, moments, tapped
from lora_jax.transform.weight import CannotFactor, Term, Weight, value_size
from lora_jax.transform.weight_views import split_label

Pairs = Sequence[tuple[Label, int]]
"""Labels with sizes."""

TOKENS = "tokens"
"""Start of the labels of axes of the input and the result that the weight does not have."""


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Which axes an operation contracts, and how to run it.

    Attributes:
      contracted: For each axis of the weight that is summed, the axis of the input that it is summed with; None if the
        operation sums over windows of the input.
      batch: For each axis that weight, input and result share, its axis in the input and in the result; None if each
        row of the input (its first axis) chooses an entry of the axis.
      kept: For each other axis of the weight, its axis in the result.
      run: `run(x, array)` is the operation on an input and an array. Parameters of the equation can be changed by
        keyword. If `contracted` or `batch` has None, the array may be of another size along the kept axis, and
        along those of `contracted` that are not None.
      groups: Number of groups that the input's contracted axis and the weight's kept axis are divided into.
      by_row: With rows that choose: from an array whose first axis is the batch axis, the entry of each row.
      measure: `measure(x, taps)`: the moments of the input, if it has windows or rows that choose.
      description: Of the factored form, for `explain`.
    """

    contracted: Mapping[int, int | None]
    batch: Mapping[int, tuple[int, int] | None]
    kept: Mapping[int, int]
    run: Callable[..., jax.Array]
    groups: int = 1
    by_row: Callable[[jax.Array], jax.Array] | None = None
    measure: Callable[[jax.Array, Sequence[Factor]], Moments] | None = None
    description: str = "x·W + (x·a)·b"

    @property
    def has_labels(self) -> bool:
        """Whether every axis that input and weight share is one axis of each, so that any chain of products will do."""
        return None not in self.contracted.values() and None not in self.batch.values() and self.groups == 1


State = Callable[[Any, list[Any], int], Contraction]
"""`state(equation, operands, place)` states what an equation contracts; `operands[place]` is the weight."""


def contraction(*primitives: str, operand: int | None = None) -> Callable[[State], State]:
    """Registers how primitives contract a weight with an input.

    Args:
      *primitives: Names of the primitives. Their first two operands are the input and the weight.
      operand: The position of the weight; None if it may be either.

    Returns:
      A decorator of `state(equation, operands, place)`, which returns a :class:`Contraction` or raises
      :class:`~lora_jax.transform.weight.CannotFactor`. `operands[place]` is the weight, the others are arrays.

    Example:
      The axes of `jax.lax.dot_general`, for a weight on the right without batch axes:

      >>> def state(equation, operands, place):
      ...     x, weight = operands
      ...     ((x_axes, w_axes), _) = equation.params["dimension_numbers"]
      ...     lead = x.ndim - len(x_axes)
      ...     kept = [axis for axis in range(weight.value.ndim) if axis not in w_axes]
      ...     return Contraction(
      ...         contracted=dict(zip(w_axes, x_axes)),
      ...         batch={},
      ...         kept={axis: lead + position for position, axis in enumerate(kept)},
      ...         run=lambda x, array: jaxprs.bind(equation, [x, array])[0],
      ...     )
    """

    def register(state: State) -> State:
        def apply(interpreter: Evaluator, equation: Any, values: list[Any]) -> list[Any]:
            values, place = _one_weight(interpreter, equation, values, state, operand)
            weight, x = values[place], values[1 - place]
            if weight.is_adapted and not jnp.issubdtype(x.dtype, jnp.inexact):
                raise CannotFactor(f"the input has dtype {x.dtype}")
            return contract(interpreter, equation, weight, x, state(equation, values, place))

        apply.__qualname__ = state.__qualname__
        registered: Rule = apply
        rule(*primitives)(registered)
        return state

    return register


def _one_weight(interpreter: Evaluator, equation: Any, values: Sequence[Any], state: State, operand: int | None):
    """The operands with one weight, and its position. Of two weights, one is merged and is the input."""
    values = list(values)
    positions = [position for position, value in enumerate(values) if isinstance(value, Weight)]
    if positions[-1] > 1 or operand not in (None, *positions):
        raise CannotFactor(f"a weight is the input or an index of {equation.primitive.name}")
    place = positions[-1] if operand is None else operand
    if len(positions) == 2:
        if operand is None and values[1].sliced and not values[0].sliced:
            place = 0
        other = values[1 - place]
        values[1 - place] = jax.ShapeDtypeStruct(other.value.shape, other.value.dtype)
        operation = state(equation, values, place)
        # What reaches the weight is an output of the other one.
        shared = {at[0]: "batch" for at in operation.batch.values() if at is not None}
        by_axis = dict.fromkeys(operation.contracted.values(), "out") | shared
        roles = {label: by_axis.get(axis, "in") for axis, pairs in enumerate(other.dims) for label, _ in pairs}
        reason = "both operands are adapted weights"
        values[1 - place] = interpreter.materialize(other, equation, reason, roles)
    return values, place


def contract(interpreter: Evaluator, equation: Any, weight: Weight, x: jax.Array, operation: Contraction) -> list[Any]:
    """The product of an input with an adapted weight.

    Args:
      interpreter: Records the uses and numbers the dropout masks.
      equation: The contraction.
      weight: Any view of weights.
      x: The input.
      operation: The axes.

    Returns:
      One array, or a :class:`~lora_jax.transform.product.Product` that is not added up yet.
    """
    weight, groups = _split_groups(weight, operation)
    axes = _Axes(weight, x, operation, groups)
    before, after = _split_gains(weight, axes)
    offsets = [_offset(term, axes.summed, jaxprs.described(equation)) for term in weight.terms]
    for term, offset in zip(weight.terms, offsets):
        description = operation.description + ("" if offset is None else " + bias")
        interpreter.record(term, equation, axes.roles, description)
    for gain in before:
        x = times(x, axes.by_row(gain), axes.x)
    for term in weight.terms:
        if term.taps:
            check_whole(term, axes.summed)
            x = tapped(x, term.taps, _measure(operation, axes, term))
    base = product(operation.run, x, weight.value)
    out = axes.out(base)
    update = None
    for term, offset in zip(weight.terms, offsets):
        if not term.factors:
            continue
        dropout = interpreter.next_dropout(term)
        dropped = x if dropout is None else dropout(x)
        through = _labeled_chain if operation.has_labels else _kernel_chain
        delta, pairs = through(term.factors, dropped, base, axes, out, interpreter.flatten, equation)
        if offset is not None:
            delta = plus(delta, axes.by_row(offset), pairs)
        delta = placed(delta, explicit_sharding(base), base.shape)
        update = delta if update is None else update + delta
    if not after:
        return [base if update is None else Product(base, update, equation)]
    total = base if update is None else Product(base, update, equation).total()
    for gain in after:
        total = times(total, axes.by_row(gain), [pair for pairs in out for pair in pairs])
    return [total]


class _Axes:
    """The labels of the axes of the input and the result of a contraction."""

    def __init__(self, weight: Weight, x: jax.Array, operation: Contraction, groups: Pairs):
        self.operation, self.weight, self.groups = operation, weight, groups
        dims = weight.dims
        self.summed = [pair for axis in operation.contracted for pair in dims[axis]]
        self.batch = [pair for axis in operation.batch for pair in dims[axis]]
        self.kept = [pair for axis in operation.kept for pair in dims[axis]]
        # Each row of the input chooses an entry of these.
        self.chosen = [pair for axis, at in operation.batch.items() if at is None for pair in dims[axis]]
        self.roles = dict.fromkeys((label for label, _ in self.kept), "out")
        self.roles |= dict.fromkeys((label for label, _ in groups[: len(self.kept) - 1]), "batch")
        self.roles |= dict.fromkeys((label for label, _ in self.summed), "in")
        self.roles |= dict.fromkeys((label for label, _ in self.batch), "batch")
        by_axis = {at: [*groups, *dims[axis]] for axis, at in operation.contracted.items() if at is not None}
        by_axis |= {at[0]: dims[axis] for axis, at in operation.batch.items() if at is not None}
        self.token_axes = [axis for axis in range(x.ndim) if axis not in by_axis]
        by_axis |= {axis: [(f"{TOKENS}{i}", x.shape[axis])] for i, axis in enumerate(self.token_axes)}
        self.x_dims: list[Pairs] = [by_axis[axis] for axis in range(x.ndim)]
        self.x = [pair for pairs in self.x_dims for pair in pairs]

    def out(self, base: jax.Array) -> list[Pairs]:
        """The labels of each axis of the result."""
        dims, operation = self.weight.dims, self.operation
        by_axis = {at: dims[axis] for axis, at in operation.kept.items()}
        by_axis |= {at[1]: dims[axis] for axis, at in operation.batch.items() if at is not None}
        rest = [axis for axis in range(base.ndim) if axis not in by_axis]
        by_axis |= {axis: [(f"{TOKENS}{i}", base.shape[axis])] for i, axis in enumerate(rest)}
        return [by_axis[axis] for axis in range(base.ndim)]

    def by_row(self, factor: Factor) -> Factor:
        """A factor with the entry of each row, if it has an axis of which rows choose entries."""
        labels = [label for label, _ in self.chosen if label in factor.labels]
        if not labels or self.operation.by_row is None:
            return factor
        rest = [label for label in factor.labels if label not in labels]
        return Factor(self.operation.by_row(factor.transposed([*labels, *rest]).array), (f"{TOKENS}0", *rest))


def _split_groups(weight: Weight, operation: Contraction) -> tuple[Weight, Pairs]:
    """The labels at the start of the kept axis that are the groups of a contraction, which are split off if needed."""
    if operation.groups == 1:
        return weight, ()
    if weight.has_taps:
        raise CannotFactor("each group of a grouped convolution has inputs of its own")
    (axis,), groups, size = operation.kept, [], operation.groups
    while size > 1:
        label, have = weight.dims[axis][len(groups)]
        if size % have:
            if have % size:
                raise CannotFactor("groups that cut across an axis")
            weight, _ = split_label(weight, label, size, have // size)
            continue
        groups.append((label, have))
        size //= have
    return weight, groups


def _split_gains(weight: Weight, axes: _Axes) -> tuple[list[Factor], list[Factor]]:
    """Gains on contracted axes, which scale the input, and gains on the others, which scale the output."""
    scales_output = {label for label, _ in (*axes.batch, *axes.kept)}
    scales_input = {label for label, _ in (*axes.x, *axes.chosen)}
    after = [gain for gain in weight.gains if set(gain.labels) <= scales_output]
    before = [gain for gain in weight.gains if not set(gain.labels) <= scales_output]
    if any(not set(gain.labels) <= scales_input for gain in before):
        raise CannotFactor("a gain is on contracted and kept axes at once, or on the windows of a convolution")
    return before, after


def _offset(term: Term, summed: Pairs, where: str) -> Factor | None:
    """What a product adds to its result: the term's offset, if the product sums over all inputs of the weight.

    Raises:
      ValueError: The product is over a part of the inputs: several of these would add the offset several times.
    """
    if term.offset is None:
        return None
    (source,) = term.sources
    others = [
        label for label, size in summed if size > 1 and (source.axis(label) is None or label in term.offset.labels)
    ]
    if others or value_size(summed) != term.inputs:
        raise ValueError(
            f"{term.path!r}: the adapter adds a bias to the outputs, so its weight takes a product over all of its "
            f"{term.inputs} inputs and nothing else; {where} sums over {value_size(summed)} elements"
            f"{', of other axes too' if others else ''}. Multiply the whole weight with its input, or load the adapter "
            "on a base whose layer has a bias (of zeros): lora_jax.peft.load then adds the adapter's bias to that one."
        )
    return term.offset


def _measure(operation: Contraction, axes: _Axes, term: Term) -> Callable[[jax.Array], Moments]:
    """How the moments of an input are measured."""
    measure = operation.measure
    if measure is not None:
        return lambda x: measure(x, term.taps)
    return lambda x: moments(x.reshape([size for _, size in axes.x]), axes.x, term.taps)


def _labeled_chain(factors, x, base, axes: _Axes, out, flatten: bool, equation) -> tuple[jax.Array, Pairs]:
    """A low-rank term times an input whose every axis has labels: a chain of products that starts from the input.

    Returns the product and the labels of its axes.
    """
    token_axes = axes.token_axes
    x_places, places = _places(x, axes.x_dims), _places(base, out)
    later = [label for axis in token_axes[1:] for label, _ in axes.x_dims[axis]]
    divided = any(placement.get(label) for placement in (x_places, places) for label in later)
    grouped = _grouped(axes.x_dims, token_axes, flatten and not divided)
    start_labels, shape = zip(*(pair for pairs in grouped for pair in pairs))
    sharding = explicit_sharding(x)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*(x_places[label] for label in start_labels)))
    start = Factor(placed(x, sharding, shape), start_labels)
    sizes = {label: size for pairs in grouped for label, size in pairs if label.startswith(TOKENS)}
    pairs = [(label, sizes.get(label, size)) for axis in out for label, size in axis]
    pairs = [(label, size) for label, size in pairs if label in sizes or not label.startswith(TOKENS)]
    first_kept = min(axes.operation.kept.values(), default=base.ndim)
    reverse = any(axis > first_kept for axis, ((label, _), *_) in enumerate(out) if label.startswith(TOKENS))
    precision = equation.params["precision"]
    options = {"precision": precision, "dtype": base.dtype, "reverse": reverse, "places": places}
    return chain(start, factors, pairs, **options), pairs


def _grouped(dims: Sequence[Pairs], tokens: Sequence[int], flatten: bool) -> Sequence[Pairs]:
    """The axes of the input, neighboring token axes made one, which has the label of the first."""
    joined = flatten and len(tokens) > 1 and list(tokens) == list(range(tokens[0], tokens[0] + len(tokens)))
    if not joined:
        return dims
    size = math.prod(dims[axis][0][1] for axis in tokens)
    return [*dims[: tokens[0]], [(dims[tokens[0]][0][0], size)], *dims[tokens[-1] + 1 :]]


def _places(array: jax.Array, dims: Sequence[Pairs]) -> dict[Label, Any]:
    """Under a mesh with explicit axes: the mesh axes of each label of an array with these axes."""
    sharding = explicit_sharding(array)
    places: dict[Label, Any] = {}
    if sharding is not None:
        for entry, ((label, size), *rest) in zip(sharding.spec, dims):
            names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
            fits = size % math.prod(sharding.mesh.shape[name] for name in names) == 0
            places |= {label: entry if fits else None} | {label: None for label, _ in rest}
    return places


def _kernel_chain(factors, x, base, axes: _Axes, out, flatten: bool, equation) -> tuple[jax.Array, Pairs]:
    """A low-rank term times an input with windows, groups, or rows that choose.

    The operation itself is run on the factor that has the contracted axes, with `rank` features instead of the kept
    axis, and on factors of which rows choose. The others follow as a chain of products. Returns as `_labeled_chain`.
    """
    operation, precision = axes.operation, equation.params["precision"]
    chosen = {label for label, _ in axes.chosen}
    if chosen:
        result, rest = Factor(x, tuple(label for label, _ in axes.x)), picked(factors)
    else:
        kernel, rest = _kernel(factors, {label for label, _ in axes.summed})
        result = _run(axes, x, kernel, axes.weight.dims)
    while any(chosen & set(factor.labels) for factor in rest):
        # The next factor that the running result touches; one without new labels comes first.
        touching = [factor for factor in rest if set(factor.labels) & set(result.labels)]
        if not touching:
            raise CannotFactor("factors that do not form a chain, with rows that choose")
        new = {id(f): [label for label in f.labels if label not in (*chosen, *result.labels)] for f in touching}
        factor = min(touching, key=lambda factor: len(new[id(factor)]))
        rest = [other for other in rest if other is not factor]
        labels = new[id(factor)]
        shared = [label for label in factor.labels if label in result.labels]
        if len(shared) != 1 or len(labels) > 1:
            raise CannotFactor("factors that do not form a chain, with rows that choose")
        if not labels:
            array = times(result.array, axes.by_row(factor), list(result.sizes.items()))
            result = Factor(array, result.labels)
        elif chosen & set(factor.labels):
            pairs = {axis: [(shared[0], factor.sizes[shared[0]])] for axis in operation.contracted}
            dims = [pairs.get(axis, labels) for axis, labels in enumerate(axes.weight.dims)]
            result = _run(axes, result.array, factor, dims)
        else:
            target = [(label, (result.sizes | factor.sizes)[label]) for label in (f"{TOKENS}0", *labels)]
            array = factored.chain(result, [factor], target, precision=precision)
            result = Factor(array, tuple(label for label, _ in target))
    pairs = [pair for axis in out for pair in axis]
    return factored.chain(result, rest, pairs, precision=precision, dtype=base.dtype), pairs


def _kernel(factors: Sequence[Factor], summed: set[Label]) -> tuple[Factor, list[Factor]]:
    """The one factor that has contracted axes, and the others; diagonals are multiplied into it if there are any."""
    for candidates in (list(factors), folded(factors)):
        kernels = [factor for factor in candidates if summed & set(factor.labels)]
        if len(kernels) == 1:
            return kernels[0], [factor for factor in candidates if factor is not kernels[0]]
    raise CannotFactor("in axes of a convolution that several factors share")


def _run(axes: _Axes, x: jax.Array, factor: Factor, dims: Sequence[Pairs]) -> Factor:
    """Runs the operation on a factor, whose labels beside those of `dims` are the features that it keeps."""
    operation, groups = axes.operation, [label for label, _ in axes.groups]
    ((kept, at),) = operation.kept.items()
    inner = [pair for axis, pairs in enumerate(dims) if axis != kept for pair in pairs]
    features = [label for label in factor.labels if label not in (*groups, *(label for label, _ in inner))]
    sizes = factor.sizes
    layout = [list(pairs) for pairs in dims]
    layout[kept] = [*axes.groups, *((label, sizes[label]) for label in features)]
    # Labels that the factor lacks are of size one, or it is the same along them.
    pairs = [pair for axis in layout for pair in axis]
    array = factor.transposed([label for label, _ in pairs if label in sizes]).array
    array = jnp.broadcast_to(
        array.reshape([size if label in sizes else 1 for label, size in pairs]), [size for _, size in pairs]
    )
    array = narrowed(array.reshape([value_size(axis) for axis in layout]), x.dtype)
    hidden = operation.run(x, array, preferred_element_type=None)
    out = [[(f"{TOKENS}{axis - (axis > at)}", size)] for axis, size in enumerate(hidden.shape)]
    out[at] = layout[kept]
    flat = [pair for axis in out for pair in axis]
    return Factor(hidden.reshape([size for _, size in flat]), tuple(label for label, _ in flat))
