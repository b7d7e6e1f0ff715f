"""Where a delta lies on a mesh, from where its base lies."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import paths
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.leaves import is_quantized

Delta = dict[str, Adapter]
WEIGHT = "weight"


def delta_shardings(base_shardings: Any, delta: Delta) -> Delta:
    """The sharding of every array of a delta, from those of the weights.

    An axis that an array has in common with its weight is divided as the weight's is: of a low-rank pair `a` has the
    batch and in axes, `b` the batch and out axes, and the rank is whole everywhere. Optimizer state that is made of a
    placed delta (`TrainState.create`) lies where the delta does.

    Args:
      base_shardings: A tree like the base, of shardings, or the base itself where its arrays are placed. A quantised
        weight's is the leaf, or the tree of shardings in its place.
      delta: Its arrays may be `jax.ShapeDtypeStruct`.

    Returns:
      A tree like `delta`, for `jax.device_put(delta, shardings)` or as `out_shardings` of what makes the delta. Where a
      part of the weight's axis is no part of the array's (blocks, divided axes, sizes that do not divide) that axis is
      whole.

    Raises:
      ValueError: The delta names a path that the base lacks; a leaf of `base_shardings` has no sharding.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> made = delta_shardings({"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}, delta)["w"]
      >>> made.a.spec, made.b.spec
      (P(None, 'fsdp'), P(None, 'tensor'))
    """
    leaves = paths.flatten(base_shardings).as_dict()
    made = {}
    for path, node in delta.items():
        if path not in leaves:
            raise ValueError(f"The base has no sharding for {path!r}; {paths.nearest(path, list(leaves))}.")
        sharding = _sharding_of(path, leaves[path], len(node.shape()))
        made[path] = _of_adapter(node, sharding)
    return made


def _sharding_of(path: str, leaf: Any, ndim: int) -> jax.sharding.Sharding:
    """The sharding of a weight, of so many axes."""
    stored = leaf.codes if is_quantized(leaf) else leaf
    sharding = stored if isinstance(stored, jax.sharding.Sharding) else getattr(stored, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        raise ValueError(
            f"{path!r} has no sharding: {type(leaf).__name__}. Give a tree of shardings, or placed arrays."
        )
    return leaf.unpacked(sharding, ndim) if is_quantized(leaf) and isinstance(sharding, NamedSharding) else sharding


def _of_adapter(node: Adapter, sharding: jax.sharding.Sharding) -> Adapter:
    if not isinstance(sharding, NamedSharding):  # a single device: everything lies there
        return jax.tree.map(lambda _: sharding, node)
    shape = node.shape()
    entries = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    by_role = {role: [e for e, r in zip(entries, node.axes) if r == role] for role in (BATCH, IN, OUT)}
    by_role[WEIGHT] = list(entries)
    changes = {}
    for field in dataclasses.fields(node):  # pyrefly: ignore[bad-argument-type]
        if "trained" in field.metadata:
            array = getattr(node, field.name)
            named = [entry for word in node.layout(field.name).split() for entry in by_role.get(word, [None])]
            spec = [
                entry if size % _ways(entry, sharding.mesh) == 0 else None for entry, size in zip(named, array.shape)
            ]
            changes[field.name] = NamedSharding(
                sharding.mesh,
                PartitionSpec(*spec, *[None] * (array.ndim - len(spec))),
                memory_kind=sharding.memory_kind,
            )
    return dataclasses.replace(node, **changes)  # pyrefly: ignore[bad-specialization]


def _ways(names: Any, mesh: Any) -> int:
    """How many parts an axis is in."""
    if names is None:
        return 1
    return math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)))
