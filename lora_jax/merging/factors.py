"""The factors of LoRA adapters as matrices, and the singular value decomposition of their product."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.layouts import RANK
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.leaves import align_leading


class Spectrum(NamedTuple):
    """The singular value decomposition of `aᵀ·b`, without the adapter's scale.

    Attributes:
      inputs: `[*lead, rank, in]`, the singular vectors in the input space.
      values: `[*lead, rank]`, in descending order.
      outputs: `[*lead, rank, out]`, the singular vectors in the output space.
    """

    inputs: jax.Array
    values: jax.Array
    outputs: jax.Array


def count_lead(node: LoRAAdapter) -> int:
    """Returns the number of axes before the rank."""
    return node.labels("a").index(RANK)


def multiply(array: jax.Array, scale: jax.Array, factor: float = 1.0) -> jax.Array:
    """Multiplies an array in float32 by a scale whose axes are its first ones."""
    return array.astype(jnp.float32) * align_leading(scale * factor, array.ndim)


def matrices(node: LoRAAdapter) -> tuple[jax.Array, jax.Array]:
    """Returns the factors as `[*lead, rank, in]` and `[*lead, rank, out]`, in float32."""
    lead = count_lead(node)
    return tuple(x.astype(jnp.float32).reshape(*x.shape[: lead + 1], -1) for x in (node.a, node.b))  # pyrefly: ignore[bad-return]


def with_factors(node: LoRAAdapter, a: jax.Array, b: jax.Array, scale: jax.Array) -> LoRAAdapter:
    """Replaces the factors by matrices of another rank, and the scale."""
    lead = count_lead(node)
    a, b = (
        new.reshape(*new.shape[: lead + 1], *old.shape[lead + 1 :]).astype(old.dtype)
        for new, old in ((a, node.a), (b, node.b))
    )
    return dataclasses.replace(node, a=a, b=b, scale=scale)


def spectrum(node: LoRAAdapter) -> Spectrum:
    """Decomposes the product of the factors by a rank × rank matrix between their orthogonal parts."""
    a, b = matrices(node)
    exact = lax.Precision.HIGHEST
    (qa, ra), (qb, rb) = jnp.linalg.qr(a.mT), jnp.linalg.qr(b.mT)
    u, values, vt = jnp.linalg.svd(jnp.matmul(ra, rb.mT, precision=exact), full_matrices=False)
    inputs = jnp.matmul(u.mT, qa.mT, precision=exact)
    return Spectrum(inputs, values, jnp.matmul(vt, qb.mT, precision=exact))


def to_rank(node: LoRAAdapter, rank: int) -> LoRAAdapter:
    """Returns the nearest adapter of at most this rank."""
    return from_spectrum(node, spectrum(node), rank)


def from_spectrum(node: LoRAAdapter, parts: Spectrum, rank: int) -> LoRAAdapter:
    """Returns an adapter of the first `rank` singular values, half of each in either factor."""
    rank = min(rank, parts.values.shape[-1])
    root = jnp.sqrt(parts.values[..., :rank])[..., None]
    return with_factors(node, root * parts.inputs[..., :rank, :], root * parts.outputs[..., :rank, :], node.scale)
