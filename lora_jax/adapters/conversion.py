"""What an adapter adds to its weight, as an ordinary low-rank term."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Label, compute_dtype, spread
from lora_jax.adapters.lowrank import LowRank
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter


def as_low_rank(node: Adapter) -> LowRank:
    """The term that an adapter adds, as factors `a` and `b`: of a LoRA itself (of a DoRA, before its magnitudes).

    AdaLoRA's values and VeRA's vectors are multiplied into the factors; LoHa's rank becomes its square.

    Raises:
      ValueError: The adapter adds no term of its own, or none that is a product of two factors.
    """
    if isinstance(node, LowRank):
        return LowRank(node.a, node.b, node.scale, node.dropout, node.axes, node.blocks)
    form = node.factored(jax.ShapeDtypeStruct(node.shape(), jnp.float32)) if node.additive else None  # pyrefly: ignore[bad-argument-type]
    axes = [] if form is None else [label for axis in form.labels for label in axis]
    if form is None or not form.factors or len(axes) != len(node.axes):
        raise ValueError(f"what a {node.kind} adapter does to its weight is no product of two factors.")
    batch, into, out = (roles.labels(node.axes, role) for role in (BATCH, IN, OUT))
    sizes = {label: size for factor in form.factors for label, size in factor.sizes.items()}
    bonds = [label for label in sizes if label not in axes]
    right = [factor for factor in form.factors if set(factor.labels) & set(out)]
    left = [factor for factor in form.factors if not set(factor.labels) & set(out)]
    if any(set(factor.labels) & set(into) for factor in right):
        raise ValueError(f"what a {node.kind} adapter does to its weight is no product of two factors.")

    def product(factors: Sequence[Factor], ends: Sequence[Label]) -> jax.Array:
        labels = [(label, sizes[label]) for label in (*batch, *bonds, *ends)]
        wide = [spread(factor, labels, compute_dtype(factor.array.dtype)) for factor in factors]
        shape = [sizes[label] for label in batch]
        return math.prod(wide[1:], start=wide[0]).reshape(*shape, -1, *(sizes[label] for label in ends))

    return LowRank(
        a=product(left, into),
        b=product(right, out),
        scale=jnp.ones((), jnp.float32),
        dropout=jnp.zeros((), jnp.float32) if form.dropout is None else form.dropout,
        axes=node.axes,
        blocks=(True,),
    )
