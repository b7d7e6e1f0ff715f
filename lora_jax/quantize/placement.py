"""Where the arrays of a quantised weight lie, from where the weight lay."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.quantize.leaf import Quantized


def shardings(leaf: Quantized, sharding: NamedSharding) -> Quantized:
    """The sharding of each array of a quantised weight, from that of the weight in floats.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
      >>> leaf = lora.quantize({"w": jnp.ones((64, 8))}, {"w": lora.NF4(axes=("in", "out"))})["w"]
      >>> shardings(leaf, NamedSharding(mesh, PartitionSpec(None, "tensor"))).codes.spec
      P(None, 'tensor')
    """
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        leaf.specs(sharding.spec, sharding.mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
