"""Where the arrays of a quantized weight lie, from where the weight lay."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.leaves import is_quantized
from lora_jax.quantization.leaf import Quantized


def shardings(leaf: Quantized, sharding: Sharding) -> Any:
    """The sharding of each array of a quantized weight, from that of the weight in floats.

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


def gathered(base: Any, *names: str) -> Any:
    """A base whose quantized weights are gathered as codes, along axes of an automatic mesh, where they are used.

    For FSDP. Without this the compiler dequantizes on each device what lies there and gathers floats. With it a fourth
    of the bytes is sent and each device dequantizes all that it uses: which is faster depends on the network. Both
    passes gather for themselves; where weights lie does not change.

    Args:
      base: With quantized leaves that are placed: arrays, or `jax.ShapeDtypeStruct` with shardings.
      *names: Of the mesh's axes. Axes of layers and experts that they divide stay divided.

    Returns:
      The tree with leaves that know it. What `names` do not divide is as it was. On a mesh of explicit axes, where
      the function says by `reshard` what is gathered, and in `shard_map`, leaves do not act on it.

    Raises:
      ValueError: The mesh has no axis of a name, or a leaf is traced.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
      >>> placed = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, PartitionSpec("fsdp")))
      >>> base = gathered(lora.quantize({"w": placed}, {"w": lora.NF4(axes=("in", "out"))}), "fsdp")
      >>> base["w"].used
      P(None, UNCONSTRAINED)
    """
    return jax.tree.map(lambda leaf: _gathered(leaf, names) if is_quantized(leaf) else leaf, base, is_leaf=is_quantized)


def _gathered(leaf: Any, names: tuple[str, ...]) -> Any:
    if isinstance(leaf.codes, jax.core.Tracer):
        raise ValueError(
            "gathered() was given a traced leaf, of which it is not known where it lies; call it before jit."
        )
    sharding = leaf.codes.sharding
    if not isinstance(sharding, NamedSharding):  # of one device
        return leaf
    unknown = [name for name in names if name not in sharding.mesh.shape]
    if unknown:
        raise ValueError(f"gathered(…, {unknown[0]!r}): the mesh has the axes {', '.join(sharding.mesh.axis_names)}.")
    spec = (*sharding.spec, *[None] * (len(leaf.codes.shape) - len(sharding.spec)))
    used = PartitionSpec(*(_without(entry, names) for entry in spec[leaf.layers :]))
    stays = all(entry is PartitionSpec.UNCONSTRAINED for entry in used)
    return dataclasses.replace(leaf, used=PartitionSpec() if stays else used)


def _without(entry: Any, names: tuple[str, ...]) -> Any:
    """What divides an axis, but for some axes of the mesh; nothing is said of an axis that they do not divide."""
    along = entry if isinstance(entry, tuple) else (entry,)
    if not set(along) & set(names):
        return PartitionSpec.UNCONSTRAINED
    return tuple(name for name in along if name not in names) or None


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
