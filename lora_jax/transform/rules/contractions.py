"""Matrix products with an adapted weight: `x·W + ((x·a)·b)`, never `x·(W + a·b)`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters.factored import Factor, Label, explicit_sharding, narrowed, placed, plus, times
from lora_jax.transform import jaxprs
from lora_jax.transform.lazy_dequantized import product
from lora_jax.transform.members import chain, picked
from lora_jax.transform.product import Product
from lora_jax.transform.ragged import ragged_product
from lora_jax.transform.taps import check_whole, moments, ragged_moments, tapped
from lora_jax.transform.weight import CannotFactor, Weight, offset_of

TOKENS = "tokens"
"""Label of the axes of an input that the product leaves alone."""


def chosen(interpreter, equation, values: Sequence) -> tuple[int, list]:
    """The operand that stays factored, where both may be weights; the other becomes an input."""
    values = list(values)
    places = [place for place, value in enumerate(values[:2]) if isinstance(value, Weight)]
    if len(places) == 2:
        left, right = values[:2]
        places = [0] if right.cut and not left.cut else [1]
        other = 1 - places[0]
        values[other] = interpreter.materialize(values[other], equation, "both operands are adapted weights")
    return places[0], values


def split_gains(weight: Weight, contracted: set[Label], kept: set[Label]) -> tuple[list[Factor], list[Factor]]:
    """Gains on the contracted axes, which scale the input, and gains on the others, which scale the output."""
    after = [g for g in weight.gains if set(g.labels) <= kept]
    before = [g for g in weight.gains if not set(g.labels) <= kept]
    if any(not set(g.labels) <= contracted for g in before):
        raise CannotFactor("a gain is on contracted and kept axes at once")
    return before, after


def _dot_general(interpreter, equation, values):
    params = equation.params
    place, values = chosen(interpreter, equation, values)
    weight, x = values[place], values[1 - place]
    contract, batch = params["dimension_numbers"]
    w_sum, x_sum = contract[place], contract[1 - place]
    w_batch, x_batch = batch[place], batch[1 - place]
    summed = [pair for axis in w_sum for pair in weight.dims[axis]]
    shared = [pair for axis in w_batch for pair in weight.dims[axis]]
    free_axes = [axis for axis in range(weight.value.ndim) if axis not in (*w_sum, *w_batch)]
    free = [pair for axis in free_axes for pair in weight.dims[axis]]
    roles = dict.fromkeys((x for x, _ in summed), "in") | dict.fromkeys((x for x, _ in shared), "batch")
    if weight.is_adapted and not jnp.issubdtype(x.dtype, jnp.inexact):
        raise CannotFactor(f"the input has dtype {x.dtype}")
    before, after = split_gains(weight, {x for x, _ in (*summed, *shared)}, {x for x, _ in (*shared, *free)})
    offset = offset_of(weight, summed, jaxprs.described(equation))
    reason = "x·W + (x·a)·b" if offset is None else "x·W + (x·a)·b + bias"
    interpreter.record(weight, equation, dict.fromkeys((x for x, _ in free), "out") | roles, reason)
    x_dims: list[list[tuple[Label, int]]] = [[] for _ in range(x.ndim)]
    for w_axis, x_axis in zip((*w_sum, *w_batch), (*x_sum, *x_batch)):
        x_dims[x_axis] = list(weight.dims[w_axis])
    tokens = [axis for axis in range(x.ndim) if axis not in (*x_sum, *x_batch)]
    for axis in tokens:
        x_dims[axis] = [(f"{TOKENS}{axis}", x.shape[axis])]
    pairs = [pair for axis in x_dims for pair in axis]
    for gain in before:
        x = times(x, gain, pairs)
    if weight.taps:
        check_whole(weight, summed)
        x = tapped(x, weight.taps, lambda x: moments(x.reshape([n for _, n in pairs]), pairs, weight.taps))

    def with_base(x, value):
        return jaxprs.bind(equation, [x, value] if place == 1 else [value, x])[0]

    base = product(with_base, x, weight.value)
    token_dims, free_dims = [x_dims[axis] for axis in tokens], [weight.dims[axis] for axis in free_axes]
    out_dims = [weight.dims[axis] for axis in w_batch]
    out_dims += [*token_dims, *free_dims] if place == 1 else [*free_dims, *token_dims]
    total = base
    if weight.factors:
        low_rank_input = interpreter.next_key(weight).drop_out(x)
        came, places = _places(x, x_dims), _places(base, out_dims)
        later = [label for ((label, _),) in token_dims[1:]]
        divided = any(known.get(label) for known in (came, places) for label in later)
        grouped = _grouped(x_dims, tokens, interpreter.flatten and not divided)
        token_pairs = [pair for group in grouped for pair in group if pair[0].startswith(TOKENS)]
        labels, shape = zip(*(pair for group in grouped for pair in group))
        start = Factor(placed(low_rank_input, _sharding(x, labels, came), shape), labels)
        out = [*shared, *token_pairs, *free] if place == 1 else [*shared, *free, *token_pairs]
        options = {"precision": params["precision"], "dtype": base.dtype, "reverse": place == 0, "places": places}
        delta = chain(start, weight.factors, out, **options)
        if offset is not None:
            delta = plus(delta, offset, out)
        pending = Product(base, placed(delta, explicit_sharding(base), base.shape), equation)
        if not after:
            return [pending]
        total = pending.total()
    for gain in after:
        total = times(total, gain, [pair for axis in out_dims for pair in axis])
    return [total]


def _grouped(x_dims, tokens: Sequence[int], flatten: bool):
    """The axes of the input, neighboring token axes made one, which has the label of the first."""
    joined = flatten and len(tokens) > 1 and list(tokens) == list(range(tokens[0], tokens[0] + len(tokens)))
    if not joined:
        return x_dims
    size = 1
    for axis in tokens:
        size *= x_dims[axis][0][1]
    return [*x_dims[: tokens[0]], [(x_dims[tokens[0]][0][0], size)], *x_dims[tokens[-1] + 1 :]]


def _places(array, dims: Sequence[Sequence[tuple[Label, int]]]) -> dict[Label, Any]:
    """Under a mesh with explicit axes: the mesh axes of each label of an array, whose axes are these."""
    sharding = explicit_sharding(array)
    found: dict[Label, Any] = {}
    if sharding is not None:
        for names, ((label, size), *rest) in zip(sharding.spec, dims):
            fits = size % math.prod(sharding.mesh.shape[name] for name in _names(names)) == 0
            found |= {label: names if fits else None} | {label: None for label, _ in rest}
    return found


def _sharding(array, labels: Sequence[Label], places: Mapping[Label, Any]) -> NamedSharding | None:
    """Under a mesh with explicit axes: the sharding of an array that is reshaped to axes with these labels."""
    sharding = explicit_sharding(array)
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*(places[x] for x in labels)))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a partition spec names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _ragged_dot(interpreter, equation, values):
    """Tokens sorted by group (expert), each group times its own weight."""
    x, weight, sizes = values[:3]
    params = equation.params
    if not isinstance(weight, Weight) or len(values) > 3:
        raise CannotFactor("a ragged product whose weight is not its second operand")
    if not is_ragged_dot(equation):
        raise CannotFactor("a ragged product of another form than ragged_dot's")
    group, into, out = (weight.single(axis) for axis in range(3))
    if isinstance(x, Weight):
        x = interpreter.materialize(x, equation, "both operands are adapted weights")
    offset = offset_of(weight, weight.dims[1], jaxprs.described(equation))
    interpreter.record(
        weight,
        equation,
        {group: "batch", into: "in", out: "out"},
        f"each group of x: x·W + (x·a)·b{'' if offset is None else ' + bias'}; under vmap over adapters one adapter at "
        "a time",
    )

    def grouped(left, right, dtype):
        return ragged_product(left, right, sizes, params["precision"], dtype)

    def of_rows(factor: Factor, labels: Sequence[Label]):
        """A factor with the group's axis replaced by one of rows: each row gets its group's values."""
        if group not in factor.labels:
            return factor.transposed(labels).array[None]
        array = factor.transposed([group, *labels]).array
        return jnp.repeat(array, sizes, axis=0, total_repeat_length=x.shape[0])

    before, after = split_gains(weight, {into, group}, {out, group})
    for gain in before:
        x = x * of_rows(gain, [into] if into in gain.labels else []).reshape(x.shape[0], -1).astype(x.dtype)
    if weight.taps:
        check_whole(weight, [(into, x.shape[1])])
        x = tapped(x, weight.taps, lambda x: ragged_moments(x, sizes))
    total = product(lambda x, value: grouped(x, value, params["preferred_element_type"]), x, weight.value)
    if weight.factors:
        result = Factor(interpreter.next_key(weight).drop_out(x), (TOKENS, into))
        pending = picked(weight.factors)  # rows sorted by group cannot be sorted by member too
        while pending:
            # The next factor that the running result touches; one without axes of its own comes first.
            own = {
                id(f): [label for label in f.labels if label != group and label not in result.labels] for f in pending
            }
            touching = [f for f in pending if set(f.labels) & set(result.labels)]
            if not touching:
                raise CannotFactor("factors that do not form a chain in a ragged product")
            factor = min(touching, key=lambda f: len(own[id(f)]))
            pending.remove(factor)
            shared = [label for label in factor.labels if label in result.labels]
            if len(shared) != 1 or len(own[id(factor)]) > 1:
                raise CannotFactor("factors that do not form a chain in a ragged product")
            if not own[id(factor)]:
                scales = of_rows(factor, shared).astype(x.dtype)
                result = Factor(result.array * jnp.broadcast_to(scales, result.array.shape), result.labels)
                continue
            matrix = Factor(narrowed(factor.array, x.dtype), factor.labels)
            if group in factor.labels:
                matrix = matrix.transposed([group, *shared, *own[id(factor)]])
                result = Factor(grouped(result.array, matrix.array, None), (TOKENS, *own[id(factor)]))
            else:
                target = [(TOKENS, x.shape[0]), *((label, matrix.sizes[label]) for label in own[id(factor)])]
                result = Factor(
                    chain(result, [matrix], target, precision=params["precision"]), (TOKENS, *own[id(factor)])
                )
        total = total + result.array.astype(total.dtype)
    if offset is not None:
        rows = of_rows(offset, [out] if out in offset.labels else [])
        total = (total.astype(rows.dtype) + rows.reshape(-1, offset.sizes.get(out, 1))).astype(total.dtype)
    for gain in after:
        rows = of_rows(gain, [out] if out in gain.labels else []).reshape(-1, gain.sizes.get(out, 1))
        total = total * jnp.broadcast_to(rows.astype(total.dtype), total.shape)
    return [total]


def is_ragged_dot(equation) -> bool:
    """Whether an equation is a ragged product of the form that `jax.lax.ragged_dot` makes."""
    if equation.primitive.name != "ragged_dot_general" or equation.params["group_offset"] is not None:
        return False
    numbers = equation.params["ragged_dot_dimension_numbers"]
    given = (numbers.dot_dimension_numbers, tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions))
    return given == ((((1,), (1,)), ((), ())), (0,), (0,))


def on_arrays(equation, values: Sequence) -> list:
    """The results of an equation whose inputs are arrays.

    Ragged products are evaluated by :func:`~lora_jax.transform.ragged.ragged_product`: `vmap` over members or examples
    has a rule for it, and none for JAX's own.
    """
    if not is_ragged_dot(equation):
        return jaxprs.bind(equation, values)
    (x, weight, sizes), (out,) = values, equation.outvars
    return [ragged_product(x, weight, sizes, equation.params["precision"], out.aval.dtype)]


RULES = {"dot_general": _dot_general, "ragged_dot_general": _ragged_dot}
