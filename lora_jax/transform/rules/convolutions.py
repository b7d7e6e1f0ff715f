"""Convolutions: the first factor is a convolution to `rank` features, the second mixes features."""

from typing import Any

import jax
from jax import lax

from lora_jax.transform import jaxprs
from lora_jax.transform.contraction import contraction
from lora_jax.transform.contraction_axes import TOKENS, Contraction
from lora_jax.transform.taps import moments
from lora_jax.transform.weight import CannotFactor, Weight


@contraction("conv_general_dilated", operand=1)
def convolution(equation: jaxprs.Equation, operands: list[Any], position: int) -> Contraction:
    """A convolution sums over channels and over windows of the spatial axes."""
    params, weight = equation.params, operands[position]
    if params["batch_group_count"] != 1:
        raise CannotFactor("a convolution with batch groups")
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    return Contraction(
        contracted={in_axis: numbers.lhs_spec[1], **dict.fromkeys(spatial)},
        batch={},
        free={out_axis: numbers.out_spec[1]},
        run=lambda x, kernel, **changes: jaxprs.bind(equation, [x, kernel], **changes)[0],
        groups=params["feature_group_count"],
        measure=lambda x, taps: _patch_moments(x, equation, weight, taps),
        description="conv(x, W) + conv(x, a)·b",
    )


def _patch_moments(x: jax.Array, equation: jaxprs.Equation, weight: Weight, taps):
    """The moments of the windows that a convolution multiplies with its kernel."""
    params = equation.params
    numbers = params["dimension_numbers"]
    _, in_axis, *spatial = numbers.rhs_spec
    windows = lax.conv_general_dilated_patches(
        x,
        filter_shape=[weight.value.shape[axis] for axis in spatial],
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
    )
    # A window's features are its channels, each with its positions.
    pairs = [[(f"{TOKENS}{axis}", size)] for axis, size in enumerate(windows.shape)]
    pairs[numbers.out_spec[1]] = [pair for axis in (in_axis, *spatial) for pair in weight.dims[axis]]
    flat = [pair for axis in pairs for pair in axis]
    return moments(windows.reshape([n for _, n in flat]), flat, taps)
