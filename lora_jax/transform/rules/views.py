"""Operations that leave a weight a weight: casts, transposes, reshapes, slices, scalings, shardings."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Factor, compute_dtype
from lora_jax.transform import jaxprs
from lora_jax.transform.lazy_dequantized import LazyDequantized, viewed
from lora_jax.transform.weight import CannotFactor, Weight, fresh, permuted, reshaped, sliced, spec_by_label


def _same(interpreter, equation, values):
    """Casts, copies, sharding constraints: the factors stay as they are."""
    (weight,) = values
    (value,) = viewed(equation, [weight.value])
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise CannotFactor(f"the weight becomes {value.dtype}")
    return [weight.replace(value=value)]


def _barrier(interpreter, equation, values):
    bare = [value.value if isinstance(value, Weight) else value for value in values]
    arrays, treedef = jax.tree.flatten(bare)
    results = jax.tree.unflatten(treedef, jaxprs.bind(equation, arrays))
    return [
        value.replace(value=result) if isinstance(value, Weight) else result for value, result in zip(values, results)
    ]


def _transpose(interpreter, equation, values):
    (weight,) = values
    (value,) = viewed(equation, [weight.value])
    return [permuted(weight, value, equation.params["permutation"])]


def _reshape(interpreter, equation, values):
    weight, *sizes = values
    if equation.params.get("dimensions") is not None or sizes:
        raise CannotFactor("a reshape with a permutation or traced sizes")
    (value,) = viewed(equation, [weight.value])
    return [reshaped(weight, value)]


def _squeeze(interpreter, equation, values):
    (weight,) = values
    (value,) = viewed(equation, [weight.value])
    return [reshaped(weight, value)]


def _broadcast(interpreter, equation, values):
    weight, *sizes = values
    if sizes:
        raise CannotFactor("a broadcast to traced sizes")
    (value,) = viewed(equation, [weight.value])
    places = equation.params["broadcast_dimensions"]
    added = iter(fresh(weight, value.ndim + len(places)))
    dims: list[tuple[tuple[str, int], ...]] = [((next(added), size),) for size in value.shape]
    for axis, place in enumerate(places):
        if weight.value.shape[axis] == value.shape[place]:
            dims[place] = weight.dims[axis]
        else:
            for label, _ in weight.dims[axis]:
                weight = weight.without(label)
    return [weight.replace(value=value, dims=tuple(dims))]


def _part(equation, weight: Weight, others: Sequence, sizes: Sequence[int], cut: Callable):
    """The base's value of a slice, which `cut(array, axis)` takes along one axis: a quantized layer is one of codes."""
    value = weight.value
    changed = [axis for axis, size in enumerate(value.shape) if sizes[axis] != size]
    if isinstance(value, LazyDequantized) and len(changed) == 1:
        part = value.along(changed[0], lambda array: cut(array, changed[0]))
        if part is not None:
            return part
    return viewed(equation, [value, *others])[0]


def _slice(interpreter, equation, values):
    (weight,) = values
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)

    def cut(array, axis):
        return lax.slice_in_dim(array, starts[axis], limits[axis], strides[axis], axis)

    value = _part(equation, weight, [], limits, cut)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides)):
        if (start, limit, stride) != (0, weight.value.shape[axis], 1):
            weight = sliced(weight, value, axis, start, limit, stride)
    return [weight.replace(value=value)]


def _split(interpreter, equation, values):
    (weight,) = values
    parts, start = [], 0
    axis = equation.params["axis"]
    for size, value in zip(equation.params["sizes"], viewed(equation, [weight.value])):
        parts.append(sliced(weight, value, axis, start, start + int(size)))
        start += int(size)
    return parts


def _dynamic_slice(interpreter, equation, values):
    weight, *starts = values
    if not isinstance(weight, Weight) or any(isinstance(start, Weight) for start in starts):
        raise CannotFactor("a weight is used as an index")
    sizes = equation.params["slice_sizes"]

    def taken(array, axis):
        return lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], axis)

    value = _part(equation, weight, starts, sizes, taken)
    starts = starts[: value.ndim]
    for axis, (start, size) in enumerate(zip(starts, value.shape)):
        if size == weight.value.shape[axis]:
            continue
        label = weight.single(axis)
        cut = weight.along(label, lambda array, at, s=start, n=size: lax.dynamic_slice_in_dim(array, s, n, at))
        dims = (*weight.dims[:axis], ((label, size),), *weight.dims[axis + 1 :])
        weight = cut.replace(dims=dims, cut=weight.cut | {label})
    return [weight.replace(value=value)]


def _scale(interpreter, equation, values):
    """Multiplication or division by a scalar.

    A constant scales the base and a factor. A scalar that the function computes is a gain, which multiplies outputs:
    its gradient is then a sum over outputs, and not over the weight's gradient.
    """
    name = equation.primitive.name
    if len(values) == 2 and all(isinstance(value, Weight) for value in values):
        values = _with_scalar(interpreter, equation, values)
    places = [place for place, value in enumerate(values) if isinstance(value, Weight)]
    if len(places) != 1 or (name == "div" and places == [1]):
        raise CannotFactor(f"{name} of or by weights")
    (place,) = places
    weight: Weight = values[place]
    scalar: Any = -1.0 if len(values) == 1 else values[1 - place]
    if math.prod(jnp.shape(scalar)) != 1:
        raise CannotFactor(f"{name} by an array of shape {jnp.shape(scalar)}")
    is_constant = len(values) == 1 or jaxprs.is_literal(equation.invars[1 - place])
    if not is_constant and weight.value.shape == tuple(equation.outvars[0].aval.shape):
        gain = jnp.reshape(scalar, ()).astype(compute_dtype(weight.value.dtype))
        return [weight.replace(gains=(*weight.gains, Factor(1.0 / gain if name == "div" else gain, ())))]
    bare = [value.value if isinstance(value, Weight) else value for value in values]
    (value,) = viewed(equation, bare)

    def act(array):
        factor = jnp.asarray(scalar).reshape(()).astype(array.dtype)
        return array / factor if name == "div" else array * factor

    return [weight.scaled(value, act)]


def _with_scalar(interpreter, equation, values: Sequence[Weight]) -> list:
    """Two weights, of which one is a scalar: that one as an array."""
    return [
        interpreter.materialize(value, equation, "a scalar that scales another weight")
        if math.prod(value.value.shape) == 1 < math.prod(other.value.shape)
        else value
        for value, other in zip(values, values[::-1])
    ]


def _reshard(interpreter, equation, values):
    """Under a mesh with explicit axes: the factors take the base's sharding along the axes they share."""
    (weight,) = values
    target = equation.params["dst_sharding"]
    names = spec_by_label(weight, target.spec, target.mesh)
    (value,) = viewed(equation, [weight.value])

    def place(factor: Factor) -> Factor:
        spec = jax.sharding.PartitionSpec(*(names.get(label) for label in factor.labels))
        sharding = jax.sharding.NamedSharding(target.mesh, spec)
        return Factor(jaxprs.bind(equation, [factor.array], dst_sharding=sharding)[0], factor.labels)

    return [weight.map_factors(place).replace(value=value)]


def _all_gather(interpreter, equation, values):
    """Gathering the shards of an axis: the factors that have the axis are gathered with it."""
    (weight,) = values
    params = equation.params
    if not params["tiled"]:
        raise CannotFactor("an all_gather that adds an axis")
    (value,) = viewed(equation, [weight.value])
    axis = params["all_gather_dimension"]
    label = weight.single(axis)

    def gather(factor: Factor) -> Factor:
        if label not in factor.labels:
            return factor
        (array,) = jaxprs.bind(equation, [factor.array], all_gather_dimension=factor.axis(label))
        return Factor(array, factor.labels)

    dims = (*weight.dims[:axis], ((label, value.shape[axis]),), *weight.dims[axis + 1 :])
    return [weight.map_factors(gather).replace(value=value, dims=dims)]


RULES = {
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "copy_p",
            "name",
            "pvary",
            "reduce_precision",
            "sharding_constraint",
        ),
        _same,
    ),
    "optimization_barrier": _barrier,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "mul": _scale,
    "div": _scale,
    "neg": _scale,
    "reshard": _reshard,
    "all_gather": _all_gather,
}
