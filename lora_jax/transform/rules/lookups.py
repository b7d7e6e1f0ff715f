"""Indexing: `W[ids]`, `W[:, permutation]` and `jnp.take`. The factors are indexed like the weight."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.adapters.factored import Factor
from lora_jax.transform import jaxprs
from lora_jax.transform.lazy_dequantized import LazyDequantized, apply_view
from lora_jax.transform.registry import Evaluator, rule
from lora_jax.transform.weight import CannotFactor, Weight, twin
from lora_jax.transform.weight_views import fresh


@rule("gather")
def gather(interpreter: Evaluator, equation: jaxprs.Equation, values: list[Any]) -> list[Any]:
    """A gather that indexes one axis and selects the others as a whole."""
    weight, indices = values
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        raise CannotFactor("a weight is used as an index")
    params = equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batching = [int(a) for a in numbers.operand_batching_dims]
    collapsed = [int(a) for a in numbers.collapsed_slice_dims]
    # An axis that is taken whole can be in the index map too (from a vmapped dynamic_slice).
    partial = [a for a in range(weight.value.ndim) if a not in batching and sizes[a] != weight.value.shape[a]]
    candidates = partial or collapsed
    if len(candidates) != 1 or not set(collapsed) <= set(candidates):
        raise CannotFactor("a gather that does not index exactly one axis")
    (axis,) = candidates
    if sizes[axis] != 1:
        raise CannotFactor("a gather of windows of rows")
    column = [int(a) for a in numbers.start_index_map].index(axis)
    label = weight.single(axis)
    if any(twin(label) in tap.labels for term in weight.terms for tap in term.taps):
        raise CannotFactor("rows are looked up, of which the input is a count")
    filling = params["fill_value"]
    if filling is not None and filling != 0 and not np.isnan(filling) and any(not g.labels for g in weight.gains):
        raise CannotFactor("rows out of range would be scaled")
    value = (
        weight.value if isinstance(weight.value, LazyDequantized) else apply_view(equation, [weight.value, indices])[0]
    )
    indices = indices[..., column : column + 1]

    # The axes of the indices (their last one holds the index itself) become axes of the result.
    index_dims: list[tuple[str, int]] = list(zip(fresh(weight, indices.ndim - 1), indices.shape[:-1]))
    for operand_axis, index_axis in zip(batching, numbers.start_indices_batching_dims):
        index_dims[int(index_axis)] = (weight.single(operand_axis), indices.shape[int(index_axis)])
    batch_labels = [index_dims[int(a)][0] for a in numbers.start_indices_batching_dims]

    def look_up(factor: Factor, fill: float) -> Factor:
        if label not in factor.labels:
            return factor
        at = factor.axis(label)
        shared = [x for x in batch_labels if x in factor.labels]
        indexed = {at, *(factor.axis(x) for x in shared)}
        rest = [a for a in range(factor.array.ndim) if a not in indexed]
        lead = len(index_dims)
        array = lax.gather(
            factor.array,
            indices,
            lax.GatherDimensionNumbers(
                offset_dims=tuple(range(lead, lead + len(rest))),
                collapsed_slice_dims=(at,),
                start_index_map=(at,),
                operand_batching_dims=tuple(factor.axis(x) for x in shared),
                start_indices_batching_dims=tuple(i for i, (x, _) in enumerate(index_dims) if x in shared),
            ),
            slice_sizes=[1 if a in indexed else n for a, n in enumerate(factor.array.shape)],
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            mode=params["mode"],
            fill_value=None if params["fill_value"] is None else fill,
        )
        return Factor(array, (*(x for x, _ in index_dims), *(factor.labels[a] for a in rest)))

    offsets = [int(a) for a in numbers.offset_dims]
    if isinstance(value, LazyDequantized):
        # Rows of codes where they are rows of the table, with the index axes in front.
        in_front = (
            collapsed == [0] and not batching and offsets == list(range(len(index_dims), equation.outvars[0].aval.ndim))
        )

        def take(array):
            # A row out of range gets its filling, zero or NaN, through its scales. Scales may be in the bytes of its
            # codes: all bits are set in a NaN.
            is_float, is_nan = jnp.issubdtype(array.dtype, jnp.inexact), filling is not None and np.isnan(filling)
            fill = filling if is_float else jnp.iinfo(array.dtype).max if is_nan else 0
            return look_up(Factor(array, (label, *fresh(weight, array.ndim - 1))), fill).array

        through_scales = filling is None or filling == 0 or np.isnan(filling)
        rows = value.rows(take) if in_front and through_scales else None
        value = apply_view(equation, [value, values[1]])[0] if rows is None else rows
    window = iter(a for a in range(weight.value.ndim) if a not in batching and a not in collapsed)
    lead, added = iter(index_dims), fresh(weight, indices.ndim)[-1]
    dims: list[tuple[tuple[str, int], ...]] = []
    for result_axis in range(value.ndim):
        source = next(window) if result_axis in offsets else None
        if source is None:
            dims.append((next(lead),))
        else:
            dims.append(((added, 1),) if source == axis else weight.dims[source])
    # A row that is out of range is the weight's own filling, with nothing added and not scaled.
    rows = weight.map_factors(lambda factor: look_up(factor, 0), lambda gain: look_up(gain, 1))
    rows = rows.replace(value=value, dims=tuple(dims))
    # An array of indices that depends on no input selects a part of the axis, or permutes it.
    atom, index_labels = equation.invars[1], [x for x, _ in index_dims if x not in batch_labels]
    selects = bool(index_labels) and not interpreter.is_activation(atom)
    looked_up = axis == 0 or not selects
    rows = rows.mark_sliced(label, looked_up=looked_up)
    if selects and not (looked_up and interpreter.is_input(atom)):
        rows = rows.link([(x, label) for x in index_labels])
    return [rows]
