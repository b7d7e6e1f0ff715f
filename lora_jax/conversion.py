"""Conversion of deltas whose initializer changed the base to deltas of the original base."""

import dataclasses

import jax.numpy as jnp

from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.layouts import RANK
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.leaves import align_leading


def to_plain_lora(delta: Delta, start: Delta) -> Delta:
    r"""Converts a delta for the base from :func:`lora_jax.prepare` to one for the original base, of twice the rank.

    PiSSA and similar initializers subtract :math:`s\,a_0^\top b_0` from the weight. The trained change of the original
    weight is :math:`s\,a^\top b - s\,a_0^\top b_0`: the factors side by side. It can be exported and used with the
    original weights. (After LoftQ use the quantized base: it differs from the original by more than low rank.)

    Args:
      delta: After training.
      start: As `prepare` returned it.

    Returns:
      A delta like `delta`. Adapters that started from a product of zero, and those that train a leaf in full, do not
      change; DoRA's magnitudes do not change.

    Raises:
      ValueError: The deltas differ in paths, or an adapter and its start in kind, shape or roles; the start of an
        adapter of another kind.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jax.random.normal(jax.random.key(1), (4, 3))}, lambda p, x: x @ p["w"], jnp.ones((1, 4))
      >>> moved, start = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init="pissa")}, fn, [(x,)])
      >>> delta = jax.tree.map(lambda leaf: leaf + 1, start)
      >>> plain = to_plain_lora(delta, start)
      >>> one, other = lora.merge(moved, delta)["w"], lora.merge(base, plain)["w"]
      >>> plain["w"].rank, bool(jnp.allclose(one, other, atol=1e-5))
      (2, True)

    References:
      Meng et al., `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, appendix C
    """
    check_adapters(delta)
    check_adapters(start)
    if set(delta) != set(start):
        different = sorted(set(delta) ^ set(start))
        raise ValueError(f"to_plain_lora(delta, start): the deltas differ in their paths, {different[0]!r} for one.")
    return {path: _subtract_start(path, node, start[path]) for path, node in delta.items()}


def _subtract_start(path: str, node: Adapter, start: Adapter) -> Adapter:
    if not isinstance(node, LoRAAdapter) or not isinstance(start, LoRAAdapter):
        return node
    node = dataclasses.replace(node, fingerprint=None)
    if (type(node), node.shape(), node.axes, node.blocks) != (type(start), start.shape(), start.axes, start.blocks):
        raise ValueError(
            f"{path!r}: the adapter and its start differ: {node.kind} for shape {node.shape()} with roles {node.axes} "
            f"and {start.kind} for {start.shape()} with {start.axes}."
        )
    if start.bias is not None:
        raise ValueError(f"{path!r}: the start has a bias, which none from lora_jax.prepare has.")
    if not (jnp.any(start.a) and jnp.any(start.b)):
        return node
    axis = node.labels("a").index(RANK)
    # Equal scales, the rule, leave b as it is.
    ratio = jnp.where(start.scale == node.scale, 1.0, start.scale / node.scale)
    opposite = -start.b.astype(node.b.dtype) * align_leading(ratio, node.b.ndim).astype(node.b.dtype)
    a = jnp.concatenate([node.a, start.a.astype(node.a.dtype)], axis=axis)
    return dataclasses.replace(node, a=a, b=jnp.concatenate([node.b, opposite], axis=axis))
