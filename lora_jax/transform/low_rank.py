"""The low-rank products of a contraction: an input times the factors of one term."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters import factored
from lora_jax.adapters.factored import Factor, Label, explicit_sharding, folded, narrow_dtype, placed, times
from lora_jax.meshes import shard_count
from lora_jax.transform.contraction_axes import TOKENS, Axes, Pairs
from lora_jax.transform.members import chain, pick_member
from lora_jax.transform.weight import CannotFactor, value_size


def low_rank_product(
    factors: Sequence[Factor], x: jax.Array, base: jax.Array, axes: Axes, *, flatten: bool, precision: Any
) -> tuple[jax.Array, Pairs]:
    """An input times the factors of a term.

    Args:
      factors: The factors.
      x: The input, after gains and dropout.
      base: The product with the base weight, whose shape and dtype the result has (up to axes that are joined).
      axes: The axes of the contraction.
      flatten: Whether the products see neighboring token axes of the input as one.
      precision: Of each product.

    Returns:
      The product and the labels of its axes.
    """
    product = _labeled_chain if axes.operation.has_labels else _kernel_chain
    return product(factors, x, base, axes, flatten, precision)


def _labeled_chain(factors, x, base, axes: Axes, flatten: bool, precision) -> tuple[jax.Array, Pairs]:
    """For an input whose every axis has labels: a chain of products that starts from the input."""
    token_axes, out = axes.token_axes, axes.out(base)
    x_places, places = _places(x, axes.x_dims), _places(base, out)
    later = [label for axis in token_axes[1:] for label, _ in axes.x_dims[axis]]
    divided = any(placement.get(label) for placement in (x_places, places) for label in later)
    grouped = _grouped(axes.x_dims, token_axes, flatten and not divided)
    start_labels, shape = zip(*(pair for pairs in grouped for pair in pairs))
    sharding = explicit_sharding(x)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*(x_places[label] for label in start_labels)))
    start = Factor(placed(x, sharding, shape), start_labels)
    sizes = {label: size for pairs in grouped for label, size in pairs if label.startswith(TOKENS)}
    pairs = [(label, sizes.get(label, size)) for axis in out for label, size in axis]
    pairs = [(label, size) for label, size in pairs if label in sizes or not label.startswith(TOKENS)]
    first_free = min(axes.operation.free.values(), default=base.ndim)
    reverse = any(axis > first_free for axis, ((label, _), *_) in enumerate(out) if label.startswith(TOKENS))
    options = {"precision": precision, "dtype": base.dtype, "reverse": reverse, "places": places}
    return chain(start, factors, pairs, **options), pairs


def _grouped(dims: Sequence[Pairs], tokens: Sequence[int], flatten: bool) -> Sequence[Pairs]:
    """The axes of the input, neighboring token axes made one, which has the label of the first."""
    joined = flatten and len(tokens) > 1 and list(tokens) == list(range(tokens[0], tokens[0] + len(tokens)))
    if not joined:
        return dims
    size = math.prod(dims[axis][0][1] for axis in tokens)
    return [*dims[: tokens[0]], [(dims[tokens[0]][0][0], size)], *dims[tokens[-1] + 1 :]]


def _places(array: jax.Array, dims: Sequence[Pairs]) -> dict[Label, Any]:
    """Under a mesh with explicit axes: the mesh axes of each label of an array with these axes."""
    sharding = explicit_sharding(array)
    places: dict[Label, Any] = {}
    if sharding is not None:
        for entry, ((label, size), *rest) in zip(sharding.spec, dims):
            fits = size % shard_count(entry, sharding.mesh) == 0
            places |= {label: entry if fits else None} | {label: None for label, _ in rest}
    return places


def _kernel_chain(factors, x, base, axes: Axes, flatten: bool, precision) -> tuple[jax.Array, Pairs]:
    """For an input with windows, groups, or rows that choose.

    The operation itself is run on the factor that has the contracted axes, with `rank` features instead of the free
    axis, and on factors of which rows choose. The others follow as a chain of products.
    """
    operation = axes.operation
    chosen = {label for label, _ in axes.chosen}
    if chosen:
        result, rest = Factor(x, tuple(label for label, _ in axes.x)), pick_member(factors)
    else:
        kernel, rest = _kernel(factors, {label for label, _ in axes.summed})
        result = _run(axes, x, kernel, axes.weight.dims)
    while any(chosen & set(factor.labels) for factor in rest):
        # The next factor that the running result touches; one without new labels comes first.
        touching = [factor for factor in rest if set(factor.labels) & set(result.labels)]
        if not touching:
            raise CannotFactor("factors that do not form a chain, with rows that choose")
        new = {id(f): [label for label in f.labels if label not in (*chosen, *result.labels)] for f in touching}
        factor = min(touching, key=lambda factor: len(new[id(factor)]))
        rest = [other for other in rest if other is not factor]
        labels = new[id(factor)]
        shared = [label for label in factor.labels if label in result.labels]
        if len(shared) != 1 or len(labels) > 1:
            raise CannotFactor("factors that do not form a chain, with rows that choose")
        if not labels:
            array = times(result.array, axes.by_row(factor), list(result.sizes.items()))
            result = Factor(array, result.labels)
        elif chosen & set(factor.labels):
            pairs = {axis: [(shared[0], factor.sizes[shared[0]])] for axis in operation.contracted}
            dims = [pairs.get(axis, labels) for axis, labels in enumerate(axes.weight.dims)]
            result = _run(axes, result.array, factor, dims)
        else:
            target = [(label, (result.sizes | factor.sizes)[label]) for label in (f"{TOKENS}0", *labels)]
            array = factored.chain(result, [factor], target, precision=precision)
            result = Factor(array, tuple(label for label, _ in target))
    pairs = [pair for axis in axes.out(base) for pair in axis]
    return factored.chain(result, rest, pairs, precision=precision, dtype=base.dtype), pairs


def _kernel(factors: Sequence[Factor], summed: set[Label]) -> tuple[Factor, list[Factor]]:
    """The one factor that has contracted axes, and the others; diagonals are multiplied into it if there are any."""
    for candidates in (list(factors), folded(factors)):
        kernels = [factor for factor in candidates if summed & set(factor.labels)]
        if len(kernels) == 1:
            return kernels[0], [factor for factor in candidates if factor is not kernels[0]]
    raise CannotFactor("in axes of a convolution that several factors share")


def _run(axes: Axes, x: jax.Array, factor: Factor, dims: Sequence[Pairs]) -> Factor:
    """Runs the operation on a factor, whose labels beside those of `dims` are the features that it keeps."""
    operation, groups = axes.operation, [label for label, _ in axes.groups]
    ((free, at),) = operation.free.items()
    inner = [pair for axis, pairs in enumerate(dims) if axis != free for pair in pairs]
    features = [label for label in factor.labels if label not in (*groups, *(label for label, _ in inner))]
    sizes = factor.sizes
    layout = [list(pairs) for pairs in dims]
    layout[free] = [*axes.groups, *((label, sizes[label]) for label in features)]
    # Labels that the factor lacks are of size one, or it is the same along them.
    pairs = [pair for axis in layout for pair in axis]
    array = factor.transposed([label for label, _ in pairs if label in sizes]).array
    array = jnp.broadcast_to(
        array.reshape([size if label in sizes else 1 for label, size in pairs]), [size for _, size in pairs]
    )
    array = narrow_dtype(array.reshape([value_size(axis) for axis in layout]), x.dtype)
    hidden = operation.run(x, array, preferred_element_type=None)
    out = [[(f"{TOKENS}{axis - (axis > at)}", size)] for axis, size in enumerate(hidden.shape)]
    out[at] = layout[free]
    flat = [pair for axis in out for pair in axis]
    return Factor(hidden.reshape([size for _, size in flat]), tuple(label for label, _ in flat))
