"""What an adapter adds to its weight, as an ordinary low-rank term."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lora_jax.adapters import roles
from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.factored import Factor, Factored, Label, compute_dtype, spread
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter


def is_low_rank(node: Adapter) -> bool:
    """Whether an adapter adds a product of two factors, so that :func:`as_low_rank` has it."""
    if isinstance(node, LoRAAdapter | AdaLoRAAdapter):
        return True
    form = _form(node)
    return form is not None and not any(_spans(node, factor) for factor in form.factors)


def as_low_rank(node: Adapter) -> LoRAAdapter:
    """The term that an adapter adds, as factors `a` and `b`: of a LoRA itself (of a DoRA, before its magnitudes).

    AdaLoRA's values and VeRA's vectors are multiplied into the factors; LoHa's rank becomes its square.

    Raises:
      ValueError: The adapter adds no term of its own, or none that is a product of two factors.
    """
    if isinstance(node, AdaLoRAAdapter):
        node = node.folded()
    if isinstance(node, LoRAAdapter):
        return LoRAAdapter(**{field.name: getattr(node, field.name) for field in dataclasses.fields(LoRAAdapter)})
    form = _form(node)
    if form is None or any(_spans(node, factor) for factor in form.factors):
        raise ValueError(f"what a {node.kind} adapter does to its weight is no product of two factors.")
    batch, into, out = (roles.labels(node.axes, role) for role in (BATCH, IN, OUT))
    sizes = {label: size for factor in form.factors for label, size in factor.sizes.items()}
    bonds = [label for label in sizes if label not in (*batch, *into, *out)]
    right = [factor for factor in form.factors if set(factor.labels) & set(out)]
    left = [factor for factor in form.factors if not set(factor.labels) & set(out)]

    def product(factors: Sequence[Factor], ends: Sequence[Label]) -> jax.Array:
        labels = [(label, sizes[label]) for label in (*batch, *bonds, *ends)]
        wide = [spread(factor, labels, compute_dtype(factor.array.dtype)) for factor in factors]
        shape = [sizes[label] for label in batch]
        return math.prod(wide[1:], start=wide[0]).reshape(*shape, -1, *(sizes[label] for label in ends))

    return LoRAAdapter(
        a=product(left, into),
        b=product(right, out),
        scale=jnp.ones((), jnp.float32),
        dropout=jnp.zeros((), jnp.float32) if form.dropout is None else form.dropout,
        axes=node.axes,
        blocks=(True,),
    )


def without_bias(node: Adapter) -> Adapter:
    """What an adapter does to its weight alone: a LoRA without the bias that it adds to outputs."""
    return dataclasses.replace(node, bias=None) if isinstance(node, LoRAAdapter) else node


def _form(node: Adapter) -> Factored | None:
    """The factored form of the term that an adapter adds to its weight, whatever the weight's values."""
    if not node.additive:
        return None
    form = node.factored(jax.ShapeDtypeStruct(node.shape(), jnp.float32))  # pyrefly: ignore[bad-argument-type]
    return form if form is not None and form.factors else None


def _spans(node: Adapter, factor: Factor) -> bool:
    """Whether a factor has labels of both in and out axes (parts of an axis included)."""
    axes = {node.axes[int(label.split(".")[0])] for label in factor.labels if label[0].isdigit()}
    return {IN, OUT} <= axes
