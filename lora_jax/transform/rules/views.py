"""Operations whose result is a view of a weight: casts, transposes, reshapes, slices, scalings, shardings."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Factor, compute_dtype
from lora_jax.transform import jaxprs
from lora_jax.transform.combining import as_gain
from lora_jax.transform.lazy_dequantized import LazyDequantized, apply_view
from lora_jax.transform.registry import Evaluator, rule
from lora_jax.transform.rules.combinations import bare
from lora_jax.transform.weight import CannotFactor, Weight
from lora_jax.transform.weight_views import fresh, permuted, reshaped, slice_axis, spec_by_label

Equation = jaxprs.Equation


@rule("convert_element_type", "copy", "copy_p", "name", "pvary", "reduce_precision", "sharding_constraint")
def keep_factors(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Casts, copies and sharding constraints act on the base weight only."""
    (weight,) = values
    (value,) = apply_view(equation, [weight.value])
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise CannotFactor(f"the weight becomes {value.dtype}")
    was_complex, is_complex = (jnp.issubdtype(array.dtype, jnp.complexfloating) for array in (weight.value, value))
    if was_complex and not is_complex:
        raise CannotFactor("a complex weight becomes real")
    return [weight.replace(value=value)]


@rule("device_put")
def device_put(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Only the base weight is moved."""
    if len(values) == 1:
        return keep_factors(interpreter, equation, values)
    if any(isinstance(value, Weight) and isinstance(value.value, LazyDequantized) for value in values):
        raise CannotFactor("several quantized weights are moved at once")
    return keep_all_factors(interpreter, equation, values)


@rule("optimization_barrier")
def keep_all_factors(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Operations that return several arrays unchanged."""
    arrays, treedef = jax.tree.flatten(bare(values))
    results = jax.tree.unflatten(treedef, jaxprs.bind(equation, arrays))
    return [
        value.replace(value=result) if isinstance(value, Weight) else result for value, result in zip(values, results)
    ]


@rule("transpose")
def transpose(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    (value,) = apply_view(equation, [weight.value])
    return [permuted(weight, value, equation.params["permutation"])]


@rule("reshape", "expand_dims")
def reshape(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    if sizes:
        raise CannotFactor("a reshape to traced sizes")
    (value,) = apply_view(equation, [weight.value])
    order = equation.params.get("dimensions")
    return [reshaped(weight if order is None else permuted(weight, value, order), value)]


@rule("squeeze")
def squeeze(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    (value,) = apply_view(equation, [weight.value])
    return [reshaped(weight, value)]


@rule("broadcast_in_dim")
def broadcast(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    weight, *sizes = values
    if sizes:
        raise CannotFactor("a broadcast to traced sizes")
    (value,) = apply_view(equation, [weight.value])
    targets = equation.params["broadcast_dimensions"]
    added = iter(fresh(weight, value.ndim + len(targets)))
    dims: list[tuple[tuple[str, int], ...]] = [((next(added), size),) for size in value.shape]
    for axis, target in enumerate(targets):
        if weight.value.shape[axis] == value.shape[target]:
            dims[target] = weight.dims[axis]
        else:
            for label, _ in weight.dims[axis]:
                weight = weight.without(label)
    return [weight.replace(value=value, dims=tuple(dims))]


def _part(equation, weight: Weight, others: Sequence, sizes: Sequence[int], slice_array: Callable):
    """The base value of a slice, by `slice_array(array, axis)` along one axis; a layer of codes stays codes."""
    value = weight.value
    changed = [axis for axis, size in enumerate(value.shape) if sizes[axis] != size]
    if isinstance(value, LazyDequantized) and len(changed) == 1:
        part = value.along(changed[0], lambda array: slice_array(array, changed[0]))
        if part is not None:
            return part
    return apply_view(equation, [value, *others])[0]


@rule("slice")
def static_slice(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)

    def slice_array(array, axis):
        return lax.slice_in_dim(array, starts[axis], limits[axis], strides[axis], axis)

    value = _part(equation, weight, [], limits, slice_array)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides)):
        if (start, limit, stride) != (0, weight.value.shape[axis], 1):
            weight = slice_axis(weight, value, axis, start, limit, stride)
    return [weight.replace(value=value)]


@rule("split")
def split(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    parts, start = [], 0
    axis = equation.params["axis"]
    for size, value in zip(equation.params["sizes"], apply_view(equation, [weight.value])):
        parts.append(slice_axis(weight, value, axis, start, start + int(size)))
        start += int(size)
    return parts


@rule("dynamic_slice")
def dynamic_slice(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    weight, *starts = values
    if not isinstance(weight, Weight) or any(isinstance(start, Weight) for start in starts):
        raise CannotFactor("a weight is used as an index")
    sizes = equation.params["slice_sizes"]

    def slice_array(array, axis):
        return lax.dynamic_slice_in_dim(array, starts[axis], sizes[axis], axis)

    value = _part(equation, weight, starts, sizes, slice_array)
    starts = starts[: value.ndim]
    for axis, (start, size) in enumerate(zip(starts, value.shape)):
        if size == weight.value.shape[axis]:
            continue
        label = weight.single(axis)
        part = weight.along(label, lambda array, at, s=start, n=size: lax.dynamic_slice_in_dim(array, s, n, at))
        weight = part.with_axis(axis, [(label, size)]).mark_sliced(label)
    return [weight.replace(value=value)]


@rule("neg")
def negate(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    return [weight.scaled(apply_view(equation, [weight.value])[0], jnp.negative)]


@rule("mul", "div")
def scale(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Multiplication or division by a scalar, or by an array that leaves at least one axis intact.

    A constant scales the base and a factor. A scalar or an array that the function computes is a gain, which multiplies
    inputs or outputs: its gradient is then a sum over tokens, and not over the weight's gradient.
    """
    name = equation.primitive.name
    if all(isinstance(value, Weight) for value in values):
        values = _with_array(interpreter, equation, values)
    positions = [position for position, value in enumerate(values) if isinstance(value, Weight)]
    if len(positions) != 1 or (name == "div" and positions == [1]):
        raise CannotFactor("the product of two weights" if name == "mul" else "a division by a weight")
    (position,) = positions
    weight, array = values[position], jnp.asarray(values[1 - position])
    atom = equation.invars[1 - position]
    if weight.value.shape != tuple(equation.outvars[0].aval.shape):
        raise CannotFactor(f"{name} by an array of shape {array.shape}, to which the weight is broadcast")
    if jaxprs.is_literal(atom):
        (value,) = apply_view(equation, bare(values))

        def act(factor: jax.Array) -> jax.Array:
            dtype = array.dtype if jnp.iscomplexobj(array) else factor.dtype
            scalar = array.reshape(()).astype(dtype)
            return factor.astype(dtype) / scalar if name == "div" else factor.astype(dtype) * scalar

        return [weight.scaled(value, act)]
    gain = as_gain(weight, array, interpreter.constant_axes(atom))
    entries = gain.array.astype(compute_dtype(weight.value.dtype))
    return [weight.replace(gains=(*weight.gains, Factor(1.0 / entries if name == "div" else entries, gain.labels)))]


def _with_array(interpreter: Evaluator, equation: Equation, values: Sequence[Weight]) -> list[Any]:
    """Two weights, of which the smaller one (a scalar, a vector) becomes an array."""
    return [
        interpreter.materialize(value, equation, "it scales another weight")
        if math.prod(value.value.shape) < math.prod(other.value.shape)
        else value
        for value, other in zip(values, values[::-1])
    ]


@rule("rev")
def reverse(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    (weight,) = values
    (value,) = apply_view(equation, [weight.value])
    for axis in equation.params["dimensions"]:
        for label, _ in weight.dims[axis]:
            weight = weight.along(label, lambda array, at: lax.rev(array, (at,)))
    return [weight.replace(value=value)]


@rule("tile")
def tile(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Repetitions become axes that no factor has."""
    (weight,) = values
    (value,) = apply_view(equation, [weight.value])
    repeated = zip(fresh(weight, value.ndim), equation.params["reps"], weight.dims)
    return [
        weight.replace(value=value, dims=tuple(((label, n), *axis) if n > 1 else axis for label, n, axis in repeated))
    ]


@rule("unstack")
def unstack(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """The slices along an axis."""
    (weight,) = values
    axis = equation.params["axis"]
    parts = []
    for index, value in enumerate(apply_view(equation, [weight.value])):
        if isinstance(weight.value, LazyDequantized):  # a quantized layer is one of codes
            slice_array = functools.partial(lax.index_in_dim, index=index, axis=axis, keepdims=False)
            layer = weight.value.along(axis, slice_array)
            value = value if layer is None else layer
        part = slice_axis(weight, weight.value, axis, index, index + 1)
        parts.append(reshaped(part, value))
    return parts


@rule("reshard")
def reshard(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Under a mesh with explicit axes: the factors take the base's sharding along the axes they share."""
    (weight,) = values
    target = equation.params["dst_sharding"]
    names = spec_by_label(weight, target.spec, target.mesh)
    (value,) = apply_view(equation, [weight.value])

    def reshard_factor(factor: Factor) -> Factor:
        spec = jax.sharding.PartitionSpec(*(names.get(label) for label in factor.labels))
        sharding = jax.sharding.NamedSharding(target.mesh, spec)
        return Factor(jaxprs.bind(equation, [factor.array], dst_sharding=sharding)[0], factor.labels)

    return [weight.map_factors(reshard_factor).replace(value=value)]


@rule("all_gather")
def all_gather(interpreter: Evaluator, equation: Equation, values: list[Any]) -> list[Any]:
    """Gathering the shards of an axis: the factors that have the axis are gathered with it."""
    (weight,) = values
    params = equation.params
    if not params["tiled"]:
        raise CannotFactor("an all_gather that adds an axis")
    (value,) = apply_view(equation, [weight.value])
    axis = params["all_gather_dimension"]
    label = weight.single(axis)

    def gather(factor: Factor) -> Factor:
        if label not in factor.labels:
            return factor
        (array,) = jaxprs.bind(equation, [factor.array], all_gather_dimension=factor.axis(label))
        return Factor(array, factor.labels)

    return [weight.map_factors(gather).replace(value=value).with_axis(axis, [(label, value.shape[axis])])]
