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

COMBINING = ("concatenate", "stack", "add", "add_any", "sub", "select_n")
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
    parts: list[Any] = []
    for part in values:
        if isinstance(part, Weight):
            pairs = ((fresh(part, 1)[0], 1),)
            parts.append(part.replace(dims=(*part.dims[:axis], pairs, *part.dims[axis:])))
        else:
            parts.append(jnp.expand_dims(part, axis))
    return [_joined(parts, value, axis)]


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
