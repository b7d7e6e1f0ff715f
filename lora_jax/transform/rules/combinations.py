"""Operations that combine weights with one another and with arrays: linear ones keep every weight factored."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.transform import jaxprs
from lora_jax.transform.combining import add_up, as_gain, check_summand, masked, pad_axis, stacked
from lora_jax.transform.lazy_dequantized import apply_view
from lora_jax.transform.registry import Evaluator, rule
from lora_jax.transform.weight import CannotFactor, Value, Weight
from lora_jax.transform.weight_views import fresh

Equation = jaxprs.Equation

COMBINING = (
    "concatenate",
    "stack",
    "add",
    "add_any",
    "sub",
    "select_n",
    "dynamic_update_slice",
    "scatter",
    "scatter-add",
)
"""Primitives whose result is a weight with the terms of all operands."""


def bare(values: Sequence[Any]) -> list[Any]:
    """The values, with base weights instead of weights."""
    return [value.value if isinstance(value, Weight) else value for value in values]


def _check_activations(
    interpreter: Evaluator, equation: Equation, values: Sequence[Any], atoms: Sequence[Any] | None = None
) -> None:
    """Raises `CannotFactor` if an activation is joined with a weight, which makes the weight an activation."""
    atoms = equation.invars if atoms is None else atoms
    for atom, value in zip(atoms, values[len(values) - len(atoms) :]):
        is_weight = isinstance(value, Weight) and not value.is_merged
        if not is_weight and interpreter.is_activation(atom):
            raise CannotFactor("it is joined with an activation")


@rule("concatenate")
def concatenate(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Weights and arrays one after another: the sum of the parts, each padded with zeros."""
    _check_activations(interpreter, equation, values)
    (value,) = apply_view(equation, bare(values))
    return [_joined(values, value, equation.params["dimension"])]


@rule("stack")
def stack(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """As `concatenate`, along a new axis."""
    _check_activations(interpreter, equation, values)
    (value,) = apply_view(equation, bare(values))
    axis = equation.params["axis"]
    return [_joined([_with_axis(part, axis) for part in values], value, axis)]


def _joined(parts: Sequence[Any], value: Value, axis: int) -> Weight:
    """Parts in a row along an axis, as one weight of this value."""
    weights = [part for part in parts if isinstance(part, Weight)]
    if any(weight.looked_up for weight in weights):
        raise CannotFactor("a lookup is joined with other arrays")
    if len(weights) == len(parts):
        whole = stacked(weights, axis)
        if whole is not None:
            return whole.replace(value=value)
    sizes = [_size(part, axis) for part in parts]
    padded = []
    for position, part in enumerate(parts):
        if isinstance(part, Weight):
            padded.append(pad_axis(part, axis, (sum(sizes[:position]), sum(sizes[position + 1 :]), 0)))
    return add_up(padded, value)


def _size(part: Any, axis: int) -> int:
    if not isinstance(part, Weight):
        return part.shape[axis]
    size = 1
    for _, part_size in part.dims[axis]:
        size *= part_size
    return size


@rule("pad")
def pad(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """The base weight may be padded with any scalar; terms are padded with zeros."""
    weight, fill = values
    if not isinstance(weight, Weight) or isinstance(fill, Weight):
        raise CannotFactor("a weight pads another array")
    (value,) = apply_view(equation, [weight.value, fill])
    for axis, (low, high, interior) in enumerate(equation.params["padding_config"]):
        weight = pad_axis(weight, axis, (int(low), int(high), int(interior)))
    return [weight.replace(value=value)]


@rule("add", "add_any", "sub")
def add(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """A sum of weights and arrays: the adapters' terms are those of all weights."""
    _check_activations(interpreter, equation, values)
    shape = equation.outvars[0].aval.shape
    weights = []
    for position, value in enumerate(values):
        if isinstance(value, Weight):
            check_summand(value, shape)
            minus = equation.primitive.name == "sub" and position == 1
            weights.append(value.scaled(value.value, jnp.negative) if minus else value)
    (value,) = apply_view(equation, bare(values))
    return [add_up(weights, value)]


@rule("dynamic_update_slice")
def update_slice(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """A part of a weight or an array is replaced by another."""
    starts = [start for atom in equation.invars[2:] if (start := interpreter.constant(atom)) is not None]
    if len(starts) < len(equation.invars) - 2:
        raise CannotFactor("a part is replaced at a position that is computed")
    array, part = values[:2]
    _check_activations(interpreter, equation, [array, part], equation.invars[:2])
    shape, sizes = (value.shape for value in bare([array, part]))
    (value,) = apply_view(equation, bare(values))
    return [_update(array, part, np.clip(starts, 0, np.subtract(shape, sizes)), value)]


@rule("scatter", "scatter-add")
def scatter(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """One part, as `.at[:, 3:].set(…)` and `.at[0].add(…)` state it."""
    array, _, part = values
    numbers, position = equation.params["dimension_numbers"], interpreter.constant(equation.invars[1])
    if position is None or position.ndim != 1 or numbers.operand_batching_dims:
        raise CannotFactor("several parts are replaced, or one at a position that is computed")
    _check_activations(interpreter, equation, [array, part], equation.invars[::2])
    (value,) = apply_view(equation, bare(values))
    for axis in sorted(numbers.inserted_window_dims):
        part = _with_axis(part, axis)
    starts = np.zeros(value.ndim, int)
    starts[list(numbers.scatter_dims_to_operand_dims)] = position
    return [_update(array, part, starts, value, adds=equation.primitive.name == "scatter-add")]


def _with_axis(part: Any, axis: int) -> Any:
    """A weight or an array with a new axis of size one."""
    if not isinstance(part, Weight):
        return jnp.expand_dims(part, axis)
    return part.replace(dims=(*part.dims[:axis], ((fresh(part, 1)[0], 1),), *part.dims[axis:]))


def _update(array: Any, part: Any, starts: np.ndarray, value: Value, *, adds: bool = False) -> Weight:
    """An array of which a part was replaced by another, or to which it was added; one or both are weights."""
    weights = [value for value in (array, part) if isinstance(value, Weight)]
    if any(weight.looked_up for weight in weights) or (adds and any(weight.gains for weight in weights)):
        raise CannotFactor("a lookup, or a weight with gains, is joined with other arrays")
    sizes = [_size(part, axis) for axis in range(value.ndim)]
    ends = np.add(starts, sizes)
    if min(starts, default=0) < 0 or any(ends > value.shape):
        raise CannotFactor("a part that is out of bounds is replaced")
    terms = []
    if isinstance(array, Weight):
        whole = [size == total for size, total in zip(sizes, value.shape)]
        outside = np.ones([1 if is_whole else total for is_whole, total in zip(whole, value.shape)], np.float32)
        outside[tuple(slice(None) if w else slice(start, end) for w, start, end in zip(whole, starts, ends))] = 0
        terms.append(array if adds else masked(array, as_gain(array, jnp.asarray(outside))))
    if isinstance(part, Weight):
        for axis, (start, end) in enumerate(zip(starts, ends)):
            part = pad_axis(part, axis, (int(start), value.shape[axis] - int(end), 0))
        terms.append(part)
    return add_up(terms, value)


@rule("select_n")
def select(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """A mask (`jnp.where`) that leaves an axis intact multiplies the terms of the weights that it selects."""
    which, *cases = values
    if isinstance(which, Weight):
        raise CannotFactor("a weight selects")
    _check_activations(interpreter, equation, values, equation.invars[1:])
    constant = interpreter.constant_axes(equation.invars[0])
    weights = []
    for number, case in enumerate(cases):
        if isinstance(case, Weight):
            weights.append(
                masked(case, as_gain(case, (which == np.asarray(number, which.dtype)).astype(jnp.float32), constant))
            )
    (value,) = apply_view(equation, bare(values))
    return [add_up(weights, value)]
