"""Axis roles behind operations that merge a weight, while roles are traced.

The result of such an operation is an array. While uses are collected it is carried as a weight whose terms have no
arrays and remember the use that merged them: a contraction further on then completes the roles of that use.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.transform import jaxprs
from lora_jax.transform.combining import add_up
from lora_jax.transform.weight import CannotFactor, Source, Weight, value_size
from lora_jax.transform.weight_views import fresh

_PRIMALS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr"}
"""Primitives with a primal function, and the parameter that holds its jaxpr."""

_UPDATES = ("scatter", "scatter-add", "dynamic_update_slice")
"""Primitives that write a part into an array."""

MERGED_BECAUSE = {
    **dict.fromkeys(_PRIMALS, "its derivative is declared for the weight as a whole"),
    "pallas_call": "a kernel reads the weight by blocks",
}
"""Why primitives with an inner function merge a weight."""


def merged_view(weight: Weight, uses: Sequence[Sequence[int]]) -> Weight:
    """A weight that has been merged, as it is carried on.

    Args:
      weight: The weight.
      uses: For each term, the indices of the recorded uses of its sources.
    """
    terms = (
        term if term.merge is not None else term.replace(factors=(), dropout=None, offset=None, merge=indices[0])
        for term, indices in zip(weight.terms, uses)
    )
    return weight.replace(terms=tuple(terms), gains=())


def follow_outputs(outputs: Sequence[Any], bodies: Sequence[Mapping[int, Weight]]) -> list[Any]:
    """The outputs of a construct: weights where its bodies return weights.

    Args:
      outputs: Arrays.
      bodies: For each body (the branches of a cond), the merged weights among its outputs, by position.
    """
    weights = [[body[position] for body in bodies if position in body] for position in range(len(outputs))]
    return [_resized(_joined(views), out) if views else out for out, views in zip(outputs, weights)]


def _resized(weight: Weight, value: Any) -> Weight:
    """A merged weight of another value; the sizes of the slowest labels follow its shape."""
    sizes = (size // value_size(rest) for size, (_, *rest) in zip(value.shape, weight.dims))
    dims = (((label, size), *rest) for size, ((label, _), *rest) in zip(sizes, weight.dims))
    return weight.replace(value=value, dims=tuple(dims))


def stacked_view(weight: Weight) -> Weight:
    """A merged weight that each step of a scan returns, as the stack of all of them has it."""
    (label,) = fresh(weight, 1)

    def link(source: Source) -> Source:
        axes = source.scanned if len(source.scanned) == 1 else ()
        return dataclasses.replace(source, axes=(*source.axes, *((label, axis) for axis in axes)))

    return weight.map_sources(link).replace(dims=(((label, 1),), *weight.dims))


def primal(equation: jaxprs.Equation, values: Sequence[Any]) -> tuple[jaxprs.Jaxpr, list[Any]] | None:
    """The primal function of a custom derivative rule, or the body of a Pallas kernel, with its inputs.

    A kernel reads blocks of its operands by reference. The shapes of the blocks are enough to find roles.
    """
    name = equation.primitive.name
    if name in _PRIMALS:
        return equation.params[_PRIMALS[name]], list(values)
    if name != "pallas_call":
        return None
    jaxpr = equation.params["jaxpr"]
    variables, _ = jaxprs.inputs(jaxpr)
    inputs: list[Any] = [jaxprs.outline(variable) for variable in variables]
    first = equation.params["grid_mapping"].num_index_operands
    for index, axes in enumerate(jaxprs.kernel_blocks(equation), first):
        if isinstance(values[index], Weight):
            inputs[index] = _block(values[index], inputs[index], axes)
    return jaxpr, inputs


def _block(weight: Weight, block: Any, axes: Sequence[int]) -> Any:
    """A block of a merged weight as a weight, which has some of its axes, and one entry of each other axis.

    Returns the array itself if axes made of several are divided.
    """
    pairs = [weight.dims[axis] for axis in axes]
    if any(len(pair) > 1 and value_size(pair) != size for pair, size in zip(pairs, block.shape)):
        return block
    for axis, labels in enumerate(weight.dims):
        for label, _ in labels if axis not in axes else ():
            weight = weight.mark_sliced(label)
    dims = (pair if len(pair) > 1 else ((pair[0][0], size),) for pair, size in zip(pairs, block.shape))
    return weight.replace(value=block, dims=tuple(dims))


def follow_kernel(values: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The results of a kernel that takes no input: those with the shape of a weight are this weight, changed."""
    weights = {value.value.shape: value for value in values if isinstance(value, Weight)}
    return [weights[out.shape].replace(value=out) if out.shape in weights else out for out in results]


def follow(equation: jaxprs.Equation, values: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The results of an operation without a rule: weights if they have axes of the merged weights.

    Elementwise operations keep all axes, reductions those that they do not reduce.
    """
    weights = [value for value in values if isinstance(value, Weight) and not value.looked_up]
    if not weights or not results or results[0] is None:
        return list(results)
    name, shape = equation.primitive.name, results[0].shape
    if name in jaxprs.ELEMENTWISE:
        same = [whole for weight in weights if (whole := _stretched(weight, shape)) is not None]
        if same and same[0].is_matrix:
            return [_joined(same).replace(value=results[0])]
    elif name == "get" and len(weights) == 1:  # a reference in a kernel
        indexed = jaxprs.indexed_axes(equation)
        if indexed is not None:
            axes = [axis for axis in range(weights[0].value.ndim) if axis not in indexed]
            return [_block(weights[0], results[0], axes)]
    elif name in _UPDATES:
        same = [whole for weight in weights if (whole := _stretched(weight, shape, parts=True)) is not None]
        if same and same[0].is_matrix:
            return [_joined(same).replace(value=results[0])]
    elif name.startswith("reduce_") and "axes" in equation.params and len(weights) == len(results) == 1:
        (weight,), reduced = weights, equation.params["axes"]

        def mark(source: Source) -> Source:
            labels = [label for axis in reduced for label, _ in weight.dims[axis]]
            axes = frozenset().union(*map(source.axes_of, labels))
            return dataclasses.replace(source, scanned=source.scanned | axes)

        dims = tuple(pairs for axis, pairs in enumerate(weight.dims) if axis not in reduced)
        rest = weight.map_sources(mark).replace(value=results[0], dims=dims)
        if rest.is_matrix:
            return [rest]
    return list(results)


def _stretched(weight: Weight, shape: Sequence[int], *, parts: bool = False) -> Weight | None:
    """A weight whose axes of size one (or all axes, of a part) take the sizes of a shape; None if it has other axes.

    It only serves to find roles, which do not depend on sizes.
    """
    if weight.value.ndim != len(shape):
        return None
    for axis, (size, target) in enumerate(zip(weight.value.shape, shape)):
        if size == target:
            continue
        if (size != 1 and not parts) or len(weight.dims[axis]) != 1:
            return None
        weight = weight.with_axis(axis, [(weight.single(axis), target)])
    return weight


def _joined(weights: Sequence[Weight]) -> Weight:
    """One weight with the terms of all (of the first alone, if their axes are split differently)."""
    try:
        whole = add_up(weights, weights[0].value)
    except CannotFactor:
        return weights[0]
    return whole.replace(terms=tuple(dict.fromkeys(whole.terms)))
