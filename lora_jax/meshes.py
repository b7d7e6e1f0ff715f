"""Named shardings: the axes of partition specs and how they divide arrays."""

import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec


def shard_count(entry: Any, mesh: Any) -> int:
    """Returns the number of shards along an axis, from its entry of a partition spec.

    Args:
      entry: None, the name of a mesh axis, or a tuple of names.
      mesh: A concrete or abstract mesh.
    """
    if entry is None:
        return 1
    return math.prod(mesh.shape[name] for name in (entry if isinstance(entry, tuple) else (entry,)))


def spec_entries(spec: PartitionSpec, ndim: int) -> tuple[Any, ...]:
    """Returns one entry of a partition spec for each axis of an array; trailing entries that it omits are None."""
    return (*spec, *[None] * (ndim - len(spec)))


def replicated(mesh: Any) -> NamedSharding:
    """Returns the sharding of an array that every device of a mesh holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_sharding(leaf: Any) -> NamedSharding | None:
    """Returns the sharding of an array on a mesh; None for an array on one device and for a tracer."""
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None
