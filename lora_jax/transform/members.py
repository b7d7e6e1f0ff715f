"""Products with the factors of one of several members, chosen by each example of a batch.

The factors keep an axis of members, a bond like the rank, and a one-hot vector is one more factor: the sum over the
bond is the chosen member's term, however the factors are multiplied. For batched examples, sorted by member, the
product of an input with stacked factors is one ragged product, and no factor is copied for each example.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import factored
from lora_jax.adapters.factored import Factor, Label
from lora_jax.transform.ragged import ragged_product

MEMBER = "#member"
"""Label of the axis of members. A factor with this label alone is the choice: one-hot, or zero for no member."""


def chain(
    start: Factor,
    factors: Sequence[Factor],
    out: Sequence[tuple[Label, int]],
    *,
    precision=None,
    dtype: jax.typing.DTypeLike | None = None,
    reverse: bool = False,
    places: Mapping[Label, Any] | None = None,
) -> jax.Array:
    """As :func:`lora_jax.adapters.factored.chain`, with ragged products for factors with an axis of members."""
    choice = next((factor for factor in factors if factor.labels == (MEMBER,)), None)
    if choice is None:
        return factored.chain(start, factors, out, precision=precision, dtype=dtype, reverse=reverse, places=places)
    result, pending = start, [factor for factor in factors if factor is not choice]
    while pending:
        factor = next((f for f in pending if set(f.labels) & set(result.labels)), pending[0])
        pending = [f for f in pending if f is not factor]
        later = {label for label, _ in out}.union(*(f.labels for f in pending))
        result = _product(result, factor, choice, later, precision, None if pending else dtype)
    return factored.chain(result, [], out, dtype=dtype or start.array.dtype)


def pick_member(factors: Sequence[Factor]) -> list[Factor]:
    """Returns the factors of the chosen member, without the axis of members."""
    choice = next((factor for factor in factors if factor.labels == (MEMBER,)), None)
    if choice is None:
        return list(factors)

    def pick(factor: Factor) -> Factor:
        if MEMBER not in factor.labels:
            return factor
        labels = tuple(label for label in factor.labels if label != MEMBER)
        parts = factor.transposed([MEMBER, *labels]).array
        one = choice.array.astype(parts.dtype)
        return Factor(jnp.tensordot(one, parts, 1, precision=jax.lax.Precision.HIGHEST), labels)

    return [pick(factor) for factor in factors if factor is not choice]


def _product(left: Factor, right: Factor, choice: Factor, later: set[Label], precision, dtype) -> Factor:
    shared = [label for label in right.labels if label in left.labels]
    summed = [label for label in shared if label not in later]
    new = [label for label in right.labels if label not in left.labels and label != MEMBER]
    rest = [label for label in left.labels if label not in summed]
    sizes = left.sizes | right.sizes
    if MEMBER not in right.labels or summed != shared or not summed:
        names = [label for label in (*rest, *new) if label in later]
        factors = [right, choice] if MEMBER in right.labels else [right]
        target = [(label, sizes[label]) for label in names]
        return Factor(factored.chain(left, factors, target, precision=precision, dtype=dtype), tuple(names))
    rows = left.transposed([*rest, *summed]).array
    matrices = right.transposed([MEMBER, *summed, *new]).array.astype(rows.dtype)
    count, width, columns = (math.prod(sizes[label] for label in labels) for labels in (rest, summed, new))
    product = _chosen(precision, dtype)(
        rows.reshape(count, width),
        matrices.reshape(matrices.shape[0], width, columns),
        choice.array.astype(rows.dtype),
    )
    labels = (*rest, *new)
    return Factor(product.reshape([sizes[label] for label in labels]), labels)


def _chosen(precision, dtype):
    """Returns the product of `x [n, k]` with one of `[members, k, m]`, selected by a one-hot vector."""

    @jax.custom_batching.custom_vmap
    def product(x, matrices, choice):
        matrix = jnp.tensordot(choice, matrices, 1)
        return jnp.matmul(x, matrix, precision=precision, preferred_element_type=dtype)

    @product.def_vmap
    def batched(size, is_batched, x, matrices, choice):
        x_batched, matrices_batched, choice_batched = is_batched
        if matrices_batched or not choice_batched:
            axes = tuple(0 if batched else None for batched in is_batched)
            return jax.vmap(product.fun, in_axes=axes)(x, matrices, choice), True
        if not x_batched:
            x = jnp.broadcast_to(x, (size, *x.shape))
        # Sorted by member: the rows of each follow one another; those of no member are at the end.
        # Counted as integers: bfloat16 cannot tell 256 examples of one member from 257.
        rows = jnp.sum(choice > 0, axis=0, dtype=jnp.int32) * x.shape[1]
        out = ragged_product(x.reshape(size * x.shape[1], x.shape[2]), matrices, rows, precision, dtype)
        chosen = jnp.any(choice > 0, axis=1)[:, None, None]
        out = out.reshape(size, x.shape[1], matrices.shape[2])
        return jnp.where(chosen, out, jnp.zeros((), out.dtype)), True

    return product
