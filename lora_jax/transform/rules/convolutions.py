"""Convolutions: the first factor is a convolution to `rank` features, the second mixes features."""

import math

import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Factor, chain, plus, times
from lora_jax.transform import jaxprs
from lora_jax.transform.lazy_dequantized import product
from lora_jax.transform.product import Product
from lora_jax.transform.taps import check_whole, moments, tapped
from lora_jax.transform.weight import CannotFactor, Weight, offset_of, split_label

TOKENS = "tokens"


def _conv(interpreter, equation, values):
    x, weight = values
    params = equation.params
    if not isinstance(weight, Weight):
        raise CannotFactor("a convolution over a weight")
    if params["batch_group_count"] != 1:
        raise CannotFactor("a convolution with batch groups")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    summed = [pair for axis in (in_axis, *spatial) for pair in weight.dims[axis]]
    roles = dict.fromkeys((x for x, _ in summed), "in") | dict.fromkeys((x for x, _ in weight.dims[out_axis]), "out")
    if isinstance(x, Weight):
        x = interpreter.materialize(x, equation, "both operands are adapted weights")
    offset = offset_of(weight, summed, jaxprs.described(equation))
    interpreter.record(weight, equation, roles, f"conv(x, W) + conv(x, a)·b{'' if offset is None else ' + bias'}")

    if weight.taps:
        if groups > 1:
            raise CannotFactor("a grouped convolution has inputs of its own for each group")
        check_whole(weight, summed)
        x = tapped(x, weight.taps, lambda x: _patch_moments(x, equation, weight))
    base = product(lambda *operands: jaxprs.bind(equation, operands)[0], x, weight.value)
    if not weight.is_adapted:
        return [base]
    if groups > 1 and weight.dims[out_axis][0][1] != groups:
        weight = _split_groups(weight, out_axis, groups)
        offset = weight.offset
    out = weight.dims[out_axis]
    names = {label for label, _ in summed}
    if any(names & set(gain.labels) for gain in weight.gains):
        raise CannotFactor("a gain on the in axes of a convolution")

    feature_axis = numbers.out_spec[1]
    lead = [(f"{TOKENS}{axis}", base.shape[axis]) for axis in range(base.ndim)]
    total = base
    if weight.factors:
        kernels = [factor for factor in weight.factors if names & set(factor.labels)]
        if len(kernels) != 1 or not names <= set(kernels[0].labels):
            raise CannotFactor("in axes of a convolution that several factors share")
        (kernel,) = kernels
        others = [factor for factor in weight.factors if factor is not kernel]
        sizes = kernel.sizes
        features = [label for label in kernel.labels if label not in names]
        if groups > 1:
            group = out[0][0]
            features = [group, *(x for x in features if x != group)]
            if group not in sizes:
                array = jnp.broadcast_to(kernel.array, (groups, *kernel.array.shape))
                kernel, sizes = Factor(array, (group, *kernel.labels)), {**sizes, group: groups}
        # The kernel in the weight's own layout, with the features in place of the out axis.
        order: list[list[str]] = [[] for _ in range(weight.value.ndim)]
        for axis in (in_axis, *spatial):
            order[axis] = [label for label, _ in weight.dims[axis]]
        order[out_axis] = features
        kernel = kernel.transposed([label for axis in order for label in axis])
        shape = [math.prod(sizes[label] for label in axis) for axis in order]
        (hidden,) = jaxprs.bind(
            equation,
            [interpreter.next_key(weight).drop_out(x), kernel.array.reshape(shape).astype(x.dtype)],
            preferred_element_type=None,
        )
        pairs = [[pair] for pair in lead]
        pairs[feature_axis] = [(label, sizes[label]) for label in features]
        flat = [pair for axis in pairs for pair in axis]
        start = Factor(hidden.reshape([n for _, n in flat]), tuple(label for label, _ in flat))
        result = [[pair] for pair in lead]
        result[feature_axis] = list(out)
        pairs_out = [pair for axis in result for pair in axis]
        delta = chain(start, others, pairs_out, precision=params["precision"], dtype=base.dtype)
        if offset is not None:
            delta = plus(delta, offset, pairs_out)
        pending = Product(base, delta.reshape(base.shape), equation)
        if not weight.gains:
            return [pending]
        total = pending.total()
    for gain in weight.gains:
        result = [[pair] for pair in lead]
        result[feature_axis] = list(out)
        total = times(total, gain, [p for axis in result for p in axis])
    return [total]


def _patch_moments(x, equation, weight: Weight):
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
    # A window's features are its channels, each with its places.
    pairs = [[(f"{TOKENS}{axis}", size)] for axis, size in enumerate(windows.shape)]
    pairs[numbers.out_spec[1]] = [pair for axis in (in_axis, *spatial) for pair in weight.dims[axis]]
    flat = [pair for axis in pairs for pair in axis]
    return moments(windows.reshape([n for _, n in flat]), flat, weight.taps)


def _split_groups(weight: Weight, axis: int, groups: int) -> Weight:
    """Makes the groups of a grouped convolution a label of the out axis."""
    label = weight.single(axis)
    size = weight.value.shape[axis]
    return split_label(weight, label, groups, size // groups)[0]


RULES = {"conv_general_dilated": _conv}
