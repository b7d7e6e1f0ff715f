"""The driver of contractions: everything that is the same for each operation that multiplies an input with a weight.

A rule states which axes an operation contracts (:class:`Contraction`). The driver applies gains, reads taps, computes
the product with the base weight, dropout and the low-rank products, and records the use: `x·W + ((x·a)·b)`, never
`x·(W + a·b)`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factor, explicit_sharding, placed, plus, times
from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.transform import jaxprs
from lora_jax.transform.array_products import array_product
from lora_jax.transform.contraction_axes import Axes, Contraction, Pairs, split_gains
from lora_jax.transform.lazy_dequantized import product
from lora_jax.transform.low_rank import low_rank_product
from lora_jax.transform.outputs import Output, acts_on_output
from lora_jax.transform.product import Product
from lora_jax.transform.registry import Evaluator, Rule, rule
from lora_jax.transform.taps import Moments, check_whole, insert_taps, moments
from lora_jax.transform.weight import CannotFactor, Term, Weight, value_size
from lora_jax.transform.weight_views import split_label

State = Callable[[Any, list[Any], int], Contraction]
"""`state(equation, operands, position)` states what an equation contracts; `operands[position]` is the weight."""


def contraction(*primitives: str, operand: int | None = None) -> Callable[[State], State]:
    """Registers how primitives contract a weight with an input.

    Args:
      *primitives: Names of the primitives. Their first two operands are the input and the weight.
      operand: The position of the weight; None if it may be either.

    Returns:
      A decorator of `state(equation, operands, position)`, which returns a :class:`Contraction` or raises
      :class:`~lora_jax.transform.weight.CannotFactor`. `operands[position]` is the weight, the others are arrays.

    Example:
      The axes of `jax.lax.dot_general`, for a weight on the right without batch axes:

      >>> def state(equation, operands, position):
      ...     x, weight = operands
      ...     ((x_axes, w_axes), _) = equation.params["dimension_numbers"]
      ...     lead = x.ndim - len(x_axes)
      ...     free = [axis for axis in range(weight.value.ndim) if axis not in w_axes]
      ...     return Contraction(
      ...         contracted=dict(zip(w_axes, x_axes)),
      ...         batch={},
      ...         free={axis: lead + i for i, axis in enumerate(free)},
      ...         run=lambda x, array: jaxprs.bind(equation, [x, array])[0],
      ...     )
    """

    def register(state: State) -> State:
        def apply(interpreter: Evaluator, equation: Any, values: list[Any]) -> list[Any]:
            values, position = _one_weight(interpreter, equation, values, state, operand)
            weight, x = values[position], values[1 - position]
            _check_result(weight, equation.outvars[0].aval.dtype)
            operation = state(equation, values, position)
            of_input = interpreter.is_input(equation.invars[1 - position])
            if not of_input:
                view = array_product(interpreter, equation, values, position, operation)
                if view is not None:
                    return [view]
            return contract(interpreter, equation, weight, x, operation, of_input)

        apply.__qualname__ = state.__qualname__
        registered: Rule = apply
        rule(*primitives)(registered)
        return state

    return register


def _one_weight(interpreter: Evaluator, equation: Any, values: Sequence[Any], state: State, operand: int | None):
    """The operands with one weight, and its position. Of two weights, one is merged and is the input."""
    values = list(values)
    positions = [i for i, value in enumerate(values) if isinstance(value, Weight)]
    if positions[-1] > 1 or operand not in (None, *positions):
        raise CannotFactor(f"a weight is the input or an index of {equation.primitive.name}")
    position = positions[-1] if operand is None else operand
    if len(positions) == 2:
        if operand is None and values[1].sliced and not values[0].sliced:
            position = 0
        other = values[1 - position]
        values[1 - position] = jax.ShapeDtypeStruct(other.value.shape, other.value.dtype)
        operation = state(equation, values, position)
        # What reaches the weight is an output of the other one.
        shared = {at[0]: "batch" for at in operation.batch.values() if at is not None}
        by_axis = dict.fromkeys(operation.contracted.values(), "out") | shared
        roles = {label: by_axis.get(axis, "in") for axis, pairs in enumerate(other.dims) for label, _ in pairs}
        of_input = interpreter.is_input(equation.invars[position])
        reason = "both operands are adapted weights"
        values[1 - position] = interpreter.materialize(other, equation, reason, roles, of_input=of_input)
    return values, position


def contract(
    interpreter: Evaluator, equation: Any, weight: Weight, x: jax.Array, operation: Contraction, of_input: bool
) -> list[Any]:
    """The product of an input with an adapted weight.

    Args:
      interpreter: Records the uses and numbers the dropout masks.
      equation: The contraction.
      weight: Any view of weights.
      x: The input.
      operation: The axes.
      of_input: Whether the input depends on inputs of the function.

    Returns:
      One array, a :class:`~lora_jax.transform.product.Product` that is not added up yet, or an
      :class:`~lora_jax.transform.outputs.Output`.
    """
    weight, groups = _split_groups(weight, operation)
    axes = Axes(weight, x, operation, groups)
    try:
        return _contract(interpreter, equation, weight, x, axes, of_input)
    except CannotFactor as error:
        raise CannotFactor(str(error), axes.roles, of_input=of_input) from error


def _contract(
    interpreter: Evaluator, equation: Any, weight: Weight, x: jax.Array, axes: Axes, of_input: bool
) -> list[Any]:
    operation = axes.operation
    for term in weight.terms:
        _check_roles(term, weight, axes)
    before, after = split_gains(weight, axes)
    where = jaxprs.describe_equation(equation)
    offsets = [_offset(term, axes.summed, where) for term in weight.terms]
    on_output = acts_on_output(interpreter, equation, weight, axes)
    uses: list[int] = []
    for term, offset in zip(weight.terms, offsets):
        description = operation.description + ("" if offset is None else " + bias")
        if term.on_output is not None:
            description = description if term.factors else description.partition(" + ")[0]
            description += f", then {term.on_output.description}"
        uses += interpreter.record(term, equation, axes.roles, description, of_input=of_input)
    if before or weight.has_taps:
        x = _promote(x, weight, equation.outvars[0].aval.dtype)
    for gain in before:
        x = times(x, axes.by_row(gain), axes.x)
    for term in weight.terms:
        if term.taps:
            check_whole(term, axes.summed)
            x = insert_taps(x, term.taps, _measure(operation, axes, term))
    base = product(operation.run, x, weight.value)
    x, update = _promote(x, weight, base.dtype), None
    for term, offset in zip(weight.terms, offsets):
        if not term.factors:
            continue
        dropout = interpreter.next_dropout(term)
        dropped = x if dropout is None else dropout(x)
        precision = equation.params.get("precision")
        delta, pairs = low_rank_product(
            term.factors, dropped, base, axes, flatten=interpreter.flatten, precision=precision
        )
        if offset is not None:
            delta = plus(delta, axes.by_row(offset), pairs)
        delta = placed(delta, explicit_sharding(base), base.shape)
        update = delta if update is None else update + delta
    if not after and not on_output:
        return [base if update is None else Product(base, update, equation)]
    total = base if update is None else Product(base, update, equation).total()
    dims = axes.out(base)
    for gain in after:
        total = times(total, axes.by_row(gain), [pair for pairs in dims for pair in pairs])
    if not on_output:
        return [total]
    (term,) = weight.terms
    term = Term(on_output=term.on_output, sources=term.sources)
    view = Weight(total, (term,), dims=tuple(map(tuple, dims)))
    return [Output(view, tuple(uses), equation.params.get("precision"))]


def _check_result(weight: Weight, dtype: jnp.dtype) -> None:
    """Raises `CannotFactor` if a product has a dtype that does not hold those with the factors."""
    is_complex = jnp.issubdtype(weight.value.dtype, jnp.complexfloating)
    if weight.is_adapted and not jnp.issubdtype(dtype, jnp.complexfloating if is_complex else jnp.inexact):
        raise CannotFactor(f"the product has dtype {dtype}")


def _promote(x: jax.Array, weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """The input for gains and factors, which take its dtype: in the dtype of the result if that is the wider one.

    JAX multiplies arrays of two dtypes (a real input with a complex weight, integers with floats) without casting them.
    """
    is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= dtype.itemsize
    is_real = jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(x)
    if x.dtype == weight.value.dtype or (is_wide and not is_real):
        return x
    return x.astype(dtype)


def _split_groups(weight: Weight, operation: Contraction) -> tuple[Weight, Pairs]:
    """The labels at the start of the free axis that are the groups of a contraction, which are split off if needed."""
    if operation.groups == 1:
        return weight, ()
    if weight.has_taps:
        raise CannotFactor("each group of a grouped convolution has inputs of its own")
    (axis,), groups, size = operation.free, [], operation.groups
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


def _check_roles(term: Term, weight: Weight, axes: Axes) -> None:
    """Raises `CannotFactor` if a product sums over a part of a weight's in axes (or out axes), and keeps the others.

    The factors were made for another use (absorbed latent attention contracts a projection on either side).
    """
    for source in term.sources if term.factors else ():
        summed = frozenset().union(*(source.axes_of(label) for label, size in axes.summed if size > 1))
        present = frozenset().union(*(source.axes_of(label) for label, size in weight.labels if size > 1))
        for role in (IN, OUT):
            group = {axis for axis in present if source.roles and source.roles[axis] == role}
            if summed & group and group - summed:
                roles = tuple(BATCH if axis in group - summed else r for axis, r in enumerate(source.roles))
                raise CannotFactor(
                    f"it sums over axes {sorted(summed & group)}, and the adapter's axes {source.roles} join them with "
                    f"axes {sorted(group - summed)}; an adapter with axes={roles} stays factored here"
                )


def _offset(term: Term, summed: Pairs, where: str) -> Factor | None:
    """What a product adds to its result: the term's offset, if the product sums over all inputs of the weight.

    Raises:
      ValueError: The product is over a part of the inputs: several of these would add the offset several times.
    """
    if term.offset is None:
        return None
    (source,) = term.sources
    others = [
        label
        for label, size in summed
        if size > 1 and (source.axis(label) in (None, *source.sliced) or label in term.offset.labels)
    ]
    if others or value_size(summed) != term.inputs:
        raise ValueError(
            f"{term.path!r}: the adapter adds a bias to the outputs, so its weight takes a product over all of its "
            f"{term.inputs} inputs and nothing else; {where} sums over {value_size(summed)} elements"
            f"{', of other axes too' if others else ''}. Multiply the whole weight with its input, or load the adapter "
            "on a base whose layer has a bias (of zeros): lora_jax.peft.load then adds the adapter's bias to that one."
        )
    return term.offset


def _measure(operation: Contraction, axes: Axes, term: Term) -> Callable[[jax.Array], Moments]:
    """How the moments of an input are measured."""
    measure = operation.measure
    if measure is not None:
        return lambda x: measure(x, term.taps)
    return lambda x: moments(x.reshape([size for _, size in axes.x]), axes.x, term.taps)
