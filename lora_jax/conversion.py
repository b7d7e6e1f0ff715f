"""Deltas made by moving a part of the base, as deltas of the base before the move."""

import dataclasses

import jax.numpy as jnp

from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.layouts import RANK
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.leaves import align_leading


def to_plain_lora(delta: Delta, start: Delta) -> Delta:
    r"""The trained delta for the base that :func:`lora_jax.prepare` was given, of ranks r + r.

    PiSSA and its like take :math:`s\,a_0^\top b_0` out of the weight. What they trained, on the weight as it was, is
    :math:`s\,a^\top b - s\,a_0^\top b_0`: the factors side by side. It can be exported and used with the original
    weights, which the moved base cannot. (After LoftQ the quantized base is the one to use: it differs from the
    original by more than low rank.)

    Args:
      delta: After training.
      start: As `prepare` returned it.

    Returns:
      A delta like `delta`. Adapters that started from a product of zero stay as they are, and so do those that train
      a leaf outright; DoRA keeps its magnitudes.

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
    return {path: _beside(path, node, start[path]) for path, node in delta.items()}


def _beside(path: str, node: Adapter, start: Adapter) -> Adapter:
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
