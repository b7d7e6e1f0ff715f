"""Linear expressions of several weights: padded, added, concatenated and stacked weights under common labels.

A part of a concatenation is a weight padded with zeros, and a concatenation is the sum of its padded parts. Padding
acts on the factors of a term, whose product is then zero outside the part.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Dims, Factor, Label, is_factor
from lora_jax.transform.weight import CannotFactor, Term, Value, Weight, twin, value_size
from lora_jax.transform.weight_views import split_labels

Padding = tuple[int, int, int]
"""Entries before, after and between, as for `jax.lax.pad`."""


def pad_axis(weight: Weight, axis: int, padding: Padding) -> Weight:
    """A weight padded with zeros along one axis. Its value is left as it is.

    Gains are padded with ones, so that what another term adds to the padding is not scaled.
    """
    if not any(padding):
        return weight
    _check_linear(weight, "it is joined with other arrays")
    ((label, size), *inner), (low, high, interior) = weight.dims[axis], padding
    if inner:  # the slowest of several axes is padded, by whole multiples of the others
        stride = value_size(inner)
        if low % stride or high % stride or interior:
            raise CannotFactor(f"axis {axis} is made of several axes, and padded by a part of one")
        low, high, padding = low // stride, high // stride, (low // stride, high // stride, 0)

    def pad(array: jax.Array, at: int, fill: int = 0) -> jax.Array:
        config = [padding if other == at else (0, 0, 0) for other in range(array.ndim)]
        return lax.pad(array, jnp.full((), fill, array.dtype), config)

    def with_label(factor: Factor) -> Factor:
        if label in factor.labels:
            return factor
        return Factor(jnp.broadcast_to(factor.array, (size, *factor.array.shape)), (label, *factor.labels))

    def with_label_once(term: Term) -> Term:
        if not term.factors or any(label in factor.labels for factor in term.factors):
            return term
        first, *rest = term.factors
        return term.replace(factors=(with_label(first), *rest))

    def with_one_key(term: Term) -> Term:
        if term.dropout is None or label not in term.dropout.key.labels:
            return term
        key = term.dropout.key  # a mask depends on the first key; padding has none
        at, rest = key.axis(label), tuple(x for x in key.labels if x != label)
        first = Factor(lax.index_in_dim(key.array, 0, at, keepdims=False), rest)
        return term.replace(dropout=dataclasses.replace(term.dropout, key=first))

    weight = weight.replace(terms=tuple(map(with_one_key, weight.terms)))
    weight = weight.replace(terms=tuple(map(with_label_once, weight.terms)), gains=tuple(map(with_label, weight.gains)))
    padded = weight.along(label, pad, lambda array, at: pad(array, at, 1))
    return padded.with_axis(axis, [(label, low + size + high + interior * max(size - 1, 0)), *inner])


def _check_linear(weight: Weight, reason: str) -> None:
    """Raises `CannotFactor` if the output of an adapter's layer would be that of other parts too."""
    if any(term.on_output is not None for term in weight.terms):
        raise CannotFactor(reason)


def add_up(weights: Sequence[Weight], value: Value) -> Weight:
    """The sum of weights of one shape, of which `value` is the sum of the base weights.

    All gains multiply the sum: each gain has to be one wherever another weight is not zero.
    """
    first, *others = weights
    for other in others:
        first = split_labels(first, [size for _, size in other.labels])[0]
    others = [_relabeled(split_labels(other, [size for _, size in first.labels])[0], first.dims) for other in others]
    terms = tuple(term for weight in (first, *others) for term in weight.terms)
    gains = tuple(gain for weight in (first, *others) for gain in weight.gains)
    return first.replace(value=value, terms=terms, gains=gains)


def _relabeled(weight: Weight, dims: Dims) -> Weight:
    """The same weight with the labels of another one whose axes are split alike."""
    names: dict[Label, Label] = {}
    for axis, (pairs, others) in enumerate(zip(weight.dims, dims)):
        for label, size in pairs:
            if size == 1:
                weight = weight.without(label)
        sizes, other_sizes = ([size for _, size in side if size > 1] for side in (pairs, others))
        if sizes != other_sizes:
            raise CannotFactor(f"axis {axis} is made of parts of other sizes in another weight")
        names |= dict(zip((label for label, size in pairs if size > 1), (label for label, size in others if size > 1)))
    return _rename(weight, names).replace(dims=dims)


def _rename(weight: Weight, names: Mapping[Label, Label]) -> Weight:
    """Other labels for the axes, and for bonds that would have the label of an axis."""
    twins = {twin(old): twin(new) for old, new in names.items()}

    def rename(factor: Factor) -> Factor:
        labels = (
            names.get(label) or twins.get(label) or (f"{label}*" if label in names.values() else label)
            for label in factor.labels
        )
        return Factor(factor.array, tuple(labels))

    return weight.map_factors(rename).map_sources(lambda source: source.renamed(names))


def stacked(weights: Sequence[Weight], axis: int) -> Weight | None:
    """Weights concatenated along an axis factor by factor, if their adapters are alike and have no other axis there.

    Padded terms would all take part in each layer of a scan over the axis; the stacked term has one slice for each.
    """
    if len(weights[0].dims[axis]) != 1:
        return None
    label = weights[0].single(axis)
    terms = [term for weight in weights for term in weight.terms]
    if len(terms) != len(weights) or any(weight.gains or weight.dims != weights[0].dims for weight in weights):
        return None
    if any(term.dropout is not None or term.offset is not None or term.merge is not None for term in terms):
        return None
    sources = tuple(source for term in terms for source in term.sources)
    terms = [term.replace(sources=sources) for term in terms]
    arrays = [jax.tree.leaves(term, is_leaf=is_factor) for term in terms]
    kinds = [
        (jax.tree.structure(term), [(factor.array.shape, factor.array.dtype) for factor in each])
        for term, each in zip(terms, arrays)
    ]
    if any(kind != kinds[0] for kind in kinds) or weights[0].dims[axis][0][1] != 1:
        return None
    if not arrays[0] or any(label in factor.labels for factor in arrays[0]):
        return None

    def stack(*factors: Factor) -> Factor:
        return Factor(jnp.stack([factor.array for factor in factors]), (label, *factors[0].labels))

    term = jax.tree.map(stack, *terms, is_leaf=is_factor)
    return weights[0].replace(terms=(term,)).with_axis(axis, [(label, len(weights))])


def masked(weight: Weight, mask: Factor) -> Weight:
    """The terms of a weight times a mask, a gain with labels of the weight's axes. Its value is left as it is."""
    _check_linear(weight, "a part of it is selected")
    if weight.gains:
        raise CannotFactor("a mask on a weight with gains")
    if any(label in tap.labels for term in weight.terms for tap in term.taps for label in mask.labels):
        raise CannotFactor("a mask on in axes, which the inputs that are read would not show")
    terms = (term.replace(factors=(*term.factors, mask)) if term.factors else term for term in weight.terms)
    return weight.replace(terms=tuple(terms))


def as_gain(weight: Weight, array: jax.Array, constant: Sequence[int] = ()) -> Factor:
    """An array that is broadcast to the weight's shape, as a gain on the axes along which it varies.

    Args:
      weight: The weight, of `array.ndim` axes.
      array: Of the weight's shape, or with axes of size one.
      constant: Axes along which the entries of the array are known to be equal.

    Raises:
      CannotFactor: It varies along all axes of the weight, or the weight is a lookup.
    """
    for axis in constant:
        if array.shape[axis] > 1:
            array = lax.slice_in_dim(array, 0, 1, axis=axis)
    varying = [axis for axis, size in enumerate(array.shape) if size > 1]
    if varying and weight.looked_up:
        raise CannotFactor(f"a lookup times an array of shape {array.shape}")
    pairs = [pair for axis in varying for pair in weight.dims[axis] if pair[1] > 1]
    others = [pair for axis in range(array.ndim) if axis not in varying for pair in weight.dims[axis] if pair[1] > 1]
    if pairs and not others:
        raise CannotFactor(f"an array of shape {array.shape} varies along all axes of the weight")
    return Factor(array.reshape([size for _, size in pairs]), tuple(label for label, _ in pairs))


def check_summand(weight: Weight, shape: Sequence[int]) -> None:
    """Raises `CannotFactor` unless a sum of this shape with a weight is worth keeping factored: a matrix of a layer.

    A lookup, a slice or a weight broadcast over tokens that is added to an activation is used there.
    """
    if weight.sliced or tuple(weight.value.shape) != tuple(shape):
        raise CannotFactor("a part of a weight, or a weight that is broadcast, is added")
    sizable = [label for label, size in weight.labels if size > 1]
    axes = [
        label for label in sizable if any(source.axis(label) is not None for t in weight.terms for source in t.sources)
    ]
    if len(sizable) < 2 or len(axes) < len(sizable):
        raise CannotFactor("a vector, or a weight that is broadcast, is added")
    if weight.gains:
        raise CannotFactor("a weight with gains is added")
