"""Shardings of the arrays of a quantized weight, derived from that of the weight in floats."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lora_jax.leaves import is_quantized
from lora_jax.meshes import spec_entries
from lora_jax.quantization.leaf import Quantized


def shardings(leaf: Quantized, sharding: Sharding) -> Any:
    """Computes the sharding of each array of a quantized weight from that of the weight in floats.

    Codes and scales are divided as the weight is; second-level scales only if each shard has whole blocks of them.

    Args:
      leaf: The quantized weight; its arrays may be `jax.ShapeDtypeStruct`.
      sharding: The sharding of the weight in floats.

    Returns:
      A tree like `leaf` of shardings.

    Raises:
      ValueError: A shard of the weight is not a whole number of blocks.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
      >>> leaf = lora.quantize({"w": jnp.ones((64, 8))}, {"w": lora.NF4(axes=("in", "out"))})["w"]
      >>> shardings(leaf, NamedSharding(mesh, PartitionSpec(None, "tensor"))).codes.spec
      P(None, 'tensor')
    """
    if not isinstance(sharding, NamedSharding):  # on one device
        return jax.tree.map(lambda _: sharding, leaf)
    _check_shards(leaf, sharding)
    return jax.tree.map(
        lambda spec: NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind),
        leaf.specs(sharding.spec, sharding.mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def gathered(base: Any, *names: str) -> Any:
    """Marks quantized weights to be gathered as codes, along axes of an automatic mesh, when they are used.

    For FSDP. Without this mark the compiler dequantizes each shard on its device and gathers floats. With it a fourth
    of the bytes is sent and each device dequantizes all that it uses; which is faster depends on the network. The
    forward and the backward pass each gather. The stored shardings do not change.

    Args:
      base: Parameters whose quantized leaves are sharded arrays, or `jax.ShapeDtypeStruct` with shardings.
      *names: Names of mesh axes. Layer and expert axes that they divide stay divided.

    Returns:
      The tree with marked leaves. Leaves that `names` do not divide are unchanged. The mark has no effect on a mesh of
      explicit axes, on which the function gathers by `reshard`, and in `shard_map`.

    Raises:
      ValueError: The mesh has no axis of one of the names, or a leaf is traced.

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
        raise ValueError("gathered() got a traced leaf, whose sharding is not known; call it outside of jit.")
    sharding = leaf.codes.sharding
    if not isinstance(sharding, NamedSharding):  # on one device
        return leaf
    unknown = [name for name in names if name not in sharding.mesh.shape]
    if unknown:
        raise ValueError(f"gathered(…, {unknown[0]!r}): the mesh has the axes {', '.join(sharding.mesh.axis_names)}.")
    entries = spec_entries(sharding.spec, len(leaf.codes.shape))[leaf.layers :]
    used = PartitionSpec(*(_without(entry, names) for entry in entries))
    is_unchanged = all(entry is PartitionSpec.UNCONSTRAINED for entry in used)
    return dataclasses.replace(leaf, used=PartitionSpec() if is_unchanged else used)


def _without(entry: Any, names: tuple[str, ...]) -> Any:
    """An entry of a partition spec without some mesh axes; UNCONSTRAINED if they do not occur in it."""
    mesh_axes = entry if isinstance(entry, tuple) else (entry,)
    if not set(mesh_axes) & set(names):
        return PartitionSpec.UNCONSTRAINED
    return tuple(name for name in mesh_axes if name not in names) or None


def _check_shards(leaf: Quantized, sharding: NamedSharding) -> None:
    """Raises `ValueError` unless each shard of the weight is a whole number of blocks; names a block that fits."""
    spec = spec_entries(sharding.spec, leaf.ndim)
    divided = [axis for axis in leaf.blocked if spec[axis] is not None]
    if not divided or tuple(leaf.specs(sharding.spec, sharding.mesh).codes)[leaf.block_axis] is not None:
        return
    if divided != [leaf.blocked[0]]:
        raise ValueError(
            f"blocks run along the axes {leaf.blocked} of a weight of shape {leaf.shape} together, and only the first "
            f"of these can be sharded; the sharding {sharding.spec} divides others."
        )
    part = math.prod(sharding.shard_shape(leaf.shape)[axis] for axis in leaf.blocked)
    fitting = math.gcd(part, leaf.format.block)
    can_choose = any(field.name == "block" for field in dataclasses.fields(leaf.format))
    hint = f"; block={fitting} fits" if can_choose and fitting >= 2 and fitting % 2 == 0 else ""
    raise ValueError(
        f"each shard of a weight of shape {leaf.shape} under {sharding.spec} has {part} weights for an output, "
        f"which is not a multiple of the block of {leaf.format.block}{hint}. Or shard another axis."
    )
