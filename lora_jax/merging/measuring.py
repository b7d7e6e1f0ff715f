"""The norm of the term that an adapter adds, and the distance between two, from their factors."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.factored import Factored
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.adapters.terms import as_low_rank, term, without_bias


def norm(node: Adapter) -> float:
    """The Frobenius norm of the term that an adapter adds to its weight (DoRA: before the magnitudes).

    Computed from the factors in float64. The term itself is formed only for kinds without factors (Offset, and LoHa of
    a high rank).

    Raises:
      ValueError: The adapter is not additive.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> norm(delta["w"])
      0.0
    """
    form = _form(node)
    squares = _inner(form, form) if form is not None else np.sum(np.square(_dense(node)))
    return float(np.sqrt(max(squares, 0.0)))


def distance(one: Adapter, other: Adapter, *, sign: float = -1.0) -> float:
    """The Frobenius norm of the difference between the terms of two adapters of one weight.

    Args:
      one: An adapter that adds a term (a DoRA counts before its magnitudes).
      other: Another; its kind and rank may differ.
      sign: Of `other`: −1 for the difference, 1 for the sum.

    Raises:
      ValueError: They are for weights of different shapes or roles, or one is not additive.
    """
    if (one.shape(), one.axes) != (other.shape(), other.axes):
        raise ValueError(
            f"The adapters are for different weights: shapes {one.shape()} and {other.shape()}, roles {one.axes} and "
            f"{other.axes}."
        )
    x, y = _form(one), _form(other)
    if x is None or y is None or x.labels != y.labels:
        return float(np.linalg.norm((_dense(one) + sign * _dense(other)).ravel()))
    squares = _inner(x, x) + 2 * sign * _inner(x, y) + sign**2 * _inner(y, y)
    return float(np.sqrt(max(squares, 0.0)))


def _form(node: Adapter) -> Factored | None:
    """The factors of an adapter's term; None if it has none."""
    return term(as_low_rank(node) if isinstance(node, LoRAAdapter) else node)


def _dense(node: Adapter) -> np.ndarray:
    additive = as_low_rank(node) if isinstance(node, LoRAAdapter) else node
    return np.asarray(without_bias(additive).merge(jnp.zeros(node.shape(), jnp.float32))).astype(np.float64)


def _inner(one: Factored, other: Factored) -> float:
    """The inner product of two terms whose axes have the same labels."""
    axes = {label for axis in one.labels for label in axis}
    numbers: dict[tuple[str, int], int] = {}
    operands: list[np.ndarray | Sequence[int]] = []
    for which, form in enumerate((one, other)):
        for factor in form.factors:
            # Labels of axes are shared, the bonds of each term are its own.
            names = [(label, 0 if label in axes else 1 + which) for label in factor.labels]
            operands += [np.asarray(factor.array).astype(np.float64)]
            operands += [[numbers.setdefault(name, len(numbers)) for name in names]]
    return float(np.einsum(*operands, [], optimize="greedy"))
