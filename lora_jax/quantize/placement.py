"""Where the arrays of a quantised weight lie, from where the weight lay."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.quantize.leaf import SECOND_BLOCK, Quantized, Scales


def specs(leaf: Quantized, spec: Any, mesh: Any) -> Any:
    """A partition spec for each array of a quantised weight.

    Args:
      leaf: The weight; its arrays may be shapes.
      spec: Of the weight in floats.
      mesh: Its mesh.

    Returns:
      A tree like `leaf`. Codes and scales are divided as the weight is, but along blocked axes only where each shard
      is whole blocks. Scales of the second level are divided only where each shard has whole blocks of them.
    """
    given = (*spec, *[None] * (leaf.ndim - len(spec)))
    by_axis = dict(zip(range(-leaf.ndim, 0), given))
    first, *more = (by_axis.pop(axis) for axis in leaf.blocked)
    whole = math.prod(leaf.sizes) % (leaf.format.block * _ways(first, mesh)) == 0
    along = first if whole and leaf.sizes[0] % _ways(first, mesh) == 0 and not any(more) else None
    kept = list(by_axis.values())
    entries = list(kept)
    entries.insert(len(kept) + leaf.place + 1, along)
    codes: Any = PartitionSpec(*entries)
    if not isinstance(leaf.scales, Scales):
        return dataclasses.replace(leaf, codes=codes, scales=codes)
    layers = len(leaf.scales.offset.shape)
    inner = kept[layers:]
    number = math.prod(leaf.scales.codes.shape[layers:])
    # In the order of the scales the first of the weight's other axes is the slowest.
    slowest = inner[0] if inner and not any(inner[1:]) and along is None else None
    if slowest is not None and number % (SECOND_BLOCK * _ways(slowest, mesh)):
        slowest = None
    second: Any = PartitionSpec(*kept[:layers], slowest)
    offset: Any = PartitionSpec(*kept[:layers])
    scales = Scales(codes=codes, second=second, offset=offset)
    return dataclasses.replace(leaf, codes=codes, scales=scales)


def shardings(leaf: Quantized, sharding: NamedSharding) -> Quantized:
    """The sharding of each array of a quantised weight, from that of the weight in floats.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
      >>> leaf = lora.quantize({"w": jnp.ones((64, 8))}, {"w": lora.NF4(axes=("in", "out"))})["w"]
      >>> shardings(leaf, NamedSharding(mesh, PartitionSpec(None, "tensor"))).codes.spec
      PartitionSpec(None, 'tensor')
    """
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        specs(leaf, sharding.spec, sharding.mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _ways(names: Any, mesh: Any) -> int:
    """How many parts an axis of an array is in."""
    if names is None:
        return 1
    return math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))
