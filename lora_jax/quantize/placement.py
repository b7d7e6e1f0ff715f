"""Where the arrays of a quantised weight lie, from where the weight lay."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.quantize.leaf import Quantized


def shardings(leaf: Quantized, sharding: Sharding) -> Any:
    """The sharding of each array of a quantised weight, from that of the weight in floats.

    Codes and scales are divided as the weight is; scales of the second level only where each shard has whole blocks
    of them.

    Raises:
      ValueError: A shard of the weight would be no whole number of blocks.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
      >>> leaf = lora.quantize({"w": jnp.ones((64, 8))}, {"w": lora.NF4(axes=("in", "out"))})["w"]
      >>> shardings(leaf, NamedSharding(mesh, PartitionSpec(None, "tensor"))).codes.spec
      P(None, 'tensor')
    """
    if not isinstance(sharding, NamedSharding):  # of one device: everything lies there
        return jax.tree.map(lambda _: sharding, leaf)
    _check_shards(leaf, sharding)
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        leaf.specs(sharding.spec, sharding.mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def _check_shards(leaf: Quantized, sharding: NamedSharding) -> None:
    """Raises `ValueError` where a shard of the weight is no whole number of blocks, and says which blocks fit."""
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    divided = {axis: spec[axis] for axis in leaf.blocked if spec[axis] is not None}
    if not divided or tuple(leaf.specs(sharding.spec, sharding.mesh).codes)[leaf.place] is not None:
        return
    if list(divided) != [leaf.blocked[0]]:
        raise ValueError(
            f"blocks run along the axes {leaf.blocked} of a weight of shape {leaf.shape} together, of which the first "
            f"may be divided over devices; the sharding {sharding.spec} divides others."
        )
    part = math.prod(sharding.shard_shape(leaf.shape)[axis] for axis in leaf.blocked)
    fitting = math.gcd(part, leaf.format.block)
    hint = f"; block={fitting} fits" if fitting >= 2 and fitting % 2 == 0 else ""
    raise ValueError(
        f"each shard of a weight of shape {leaf.shape} under {sharding.spec} has {part} weights an output, no whole "
        f"blocks of {leaf.format.block}{hint}. Or divide another axis."
    )
