"""Products of a weight with an array that is not an input: a rotation, or the gates of a mean of experts.

The result is a view of the weight. The array multiplies the base weight and a factor of each term, so that an input
times the view is a chain of small products.
"""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.factored import Factor, Label, chain, compute_dtype, times
from lora_jax.adapters.protocol import BATCH
from lora_jax.transform import jaxprs
from lora_jax.transform.contraction_axes import TOKENS, Axes, Contraction, split_gains
from lora_jax.transform.lazy_dequantized import apply_view
from lora_jax.transform.registry import Evaluator
from lora_jax.transform.weight import CannotFactor, Source, Term, Weight, value_size
from lora_jax.transform.weight_views import fresh


def array_product(
    interpreter: Evaluator, equation: jaxprs.Equation, values: Sequence[Any], position: int, operation: Contraction
) -> Weight | None:
    """The product of a weight with an array that depends on no input of the function.

    Args:
      interpreter: Records the product as a use.
      equation: The product.
      values: Its operands.
      position: The position of the weight among them.
      operation: The axes.

    Returns:
      A view of the weight; None if the array is an input itself: a table of positions or learned queries, which is on
      the left of the weight and has another number of rows than it has columns.

    Raises:
      CannotFactor: The product has no factored form.
    """
    if not operation.has_labels:
        return None
    weight, array = values[position], values[1 - position]
    axes = Axes(weight, array, operation, ())
    names = {f"{TOKENS}{i}": name for i, name in enumerate(fresh(weight, len(axes.token_axes)))}
    rows = value_size(pair for axis in axes.token_axes for pair in axes.x_dims[axis])
    view = _linked(weight, axes, {} if rows == 1 else names)
    dims = axes.out(equation.outvars[0].aval)
    view = view.replace(dims=tuple(tuple((names.get(label, label), size) for label, size in pairs) for pairs in dims))
    if not view.is_matrix or not (_is_mean(axes) if rows == 1 else position == 0 or rows == value_size(axes.summed)):
        return None
    before, after = split_gains(weight, axes)
    if before:
        array = array.astype(_wide_dtype(array, weight.value))
    for gain in before:
        array = times(array, gain, axes.x)
    (value,) = apply_view(equation, [array if index != position else weight.value for index in range(2)])
    factor = Factor(array.reshape([size for _, size in axes.x]), tuple(names.get(label, label) for label, _ in axes.x))
    summed = {label for label, _ in axes.summed}
    for term in weight.terms:
        interpreter.record(term, equation, axes.roles, "an array times W, and times a or b", of_input=False)
    terms = tuple(_multiply(term, factor, summed, equation.params["precision"]) for term in view.terms)
    return view.replace(value=value, terms=terms, gains=tuple(after))


def _is_mean(axes: Axes) -> bool:
    """Whether a sum with a vector may be a mean over a stack: no axis that it sums over has another role than batch."""
    summed = [label for label, _ in axes.summed]
    roles = {
        source.roles[axis]
        for term in axes.weight.terms
        for source in term.sources
        for label in summed
        for axis in source.axes_of(label)
        if source.roles
    }
    return not axes.batch and roles <= {BATCH}


def _linked(weight: Weight, axes: Axes, names: Mapping[Label, Label]) -> Weight:
    """The weight with the axes of the array, `names`, in place of those that are summed.

    An axis that is summed and not replaced is one of a stack, over which a mean is taken.
    """
    contracted = axes.operation.contracted
    summed = sorted(contracted, key=lambda axis: contracted[axis] or 0)
    pairs = zip(names.values(), summed) if len(names) == len(summed) else itertools.product(names.values(), summed)
    links = [(name, label) for name, axis in pairs for label, _ in weight.dims[axis]]

    if names:
        return weight.link(links)

    def mark(source: Source) -> Source:
        return dataclasses.replace(source, scanned=source.scanned.union(*(source.axes_of(x) for x, _ in axes.summed)))

    return weight.map_sources(mark)


def _multiply(term: Term, array: Factor, summed: Collection[Label], precision: Any) -> Term:
    """A term times an array with labels that are summed."""
    if any(label in tap.labels for tap in term.taps for label in summed):
        raise CannotFactor("an array multiplies its in axes")
    if term.on_output is not None:
        raise CannotFactor("an array multiplies it")
    if not term.factors:
        return term
    if term.offset is not None:
        raise CannotFactor("an array multiplies it")
    axes = tuple(array.axis(label) for label in summed if not any(label in factor.labels for factor in term.factors))
    array = Factor(array.array.sum(axes), tuple(x for at, x in enumerate(array.labels) if at not in axes))
    array = Factor(array.array.astype(_wide_dtype(array.array, *(f.array for f in term.factors))), array.labels)
    touching = [factor for factor in term.factors if any(label in factor.labels for label in summed)]
    if len(touching) != 1:  # the labels are bonds of several factors
        return term.replace(factors=(*term.factors, array))
    (factor,) = touching
    sizes = factor.sizes | array.sizes
    labels = [label for label in sizes if label not in summed]
    product = chain(array, [factor], [(label, sizes[label]) for label in labels], precision=precision)
    return term.replace(
        factors=tuple(Factor(product, tuple(labels)) if other is factor else other for other in term.factors)
    )


def _wide_dtype(*arrays: Any) -> np.dtype:
    """A dtype of at least float32 that holds the entries of all arrays."""
    return functools.reduce(np.promote_types, (compute_dtype(array.dtype) for array in arrays))
