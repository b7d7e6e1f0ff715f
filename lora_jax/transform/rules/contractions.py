"""Matrix products: `dot_general`, and `ragged_dot`, in which each row of the input chooses a group's matrix."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.transform import jaxprs
from lora_jax.transform.contraction import contraction
from lora_jax.transform.contraction_axes import Contraction
from lora_jax.transform.ragged import ragged_product
from lora_jax.transform.taps import ragged_moments
from lora_jax.transform.weight import CannotFactor


@contraction("dot_general")
def dot_general(equation: jaxprs.Equation, operands: list[Any], position: int) -> Contraction:
    """Batch axes come first in the result, then the free axes of the left operand, then those of the right one."""
    weight, x = operands[position], operands[1 - position]
    summed, shared = equation.params["dimension_numbers"]
    contracted = dict(zip(summed[position], summed[1 - position]))
    batch = {axis: (shared[1 - position][i], i) for i, axis in enumerate(shared[position])}
    free = [axis for axis in range(weight.value.ndim) if axis not in (*contracted, *batch)]
    first = len(batch) if position == 0 else x.ndim - len(contracted)
    return Contraction(
        contracted=contracted,
        batch=batch,
        free={axis: first + i for i, axis in enumerate(free)},
        run=lambda x, array: jaxprs.bind(equation, [x, array] if position == 1 else [array, x])[0],
    )


@contraction("ragged_dot_general", operand=1)
def ragged_dot(equation: jaxprs.Equation, operands: list[Any], position: int) -> Contraction:
    """Tokens sorted by group (expert), each group times its own matrix."""
    del position
    if not is_ragged_dot(equation):
        raise CannotFactor("a ragged product of another form than ragged_dot's")
    x, weight, sizes = operands
    for axis in range(3):
        weight.single(axis)
    dtype, precision = equation.params["preferred_element_type"], equation.params["precision"]
    return Contraction(
        contracted={1: 1},
        batch={0: None},
        free={2: 1},
        run=lambda x, array, preferred_element_type=dtype: ragged_product(
            x, array, sizes, precision, preferred_element_type
        ),
        by_row=lambda array: jnp.repeat(array, sizes, axis=0, total_repeat_length=x.shape[0]),
        measure=lambda x, taps: ragged_moments(x, sizes),
        description="each group of x: x·W + (x·a)·b; under vmap over adapters one adapter at a time",
    )


def is_ragged_dot(equation: jaxprs.Equation) -> bool:
    """Whether an equation is a ragged product of the form that `jax.lax.ragged_dot` makes."""
    if equation.primitive.name != "ragged_dot_general" or equation.params["group_offset"] is not None:
        return False
    numbers = equation.params["ragged_dot_dimension_numbers"]
    axes = (numbers.dot_dimension_numbers, tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions))
    return axes == ((((1,), (1,)), ((), ())), (0,), (0,))


def on_arrays(equation: jaxprs.Equation, values: Sequence) -> list:
    """The results of an equation whose inputs are arrays.

    Ragged products are evaluated by :func:`~lora_jax.transform.ragged.ragged_product`: `vmap` over members or examples
    has a rule for it, and none for JAX's own.
    """
    if not is_ragged_dot(equation):
        return jaxprs.bind(equation, values)
    (x, weight, sizes), (out,) = values, equation.outvars
    return [ragged_product(x, weight, sizes, equation.params["precision"], out.aval.dtype)]
