"""Arrays that are read shard by shard."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding


def read_shards(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[tuple[int, int], ...]], Any]
) -> jax.Array:
    """Returns an array of which each device receives only its shard.

    Args:
      shape: The shape of the array.
      sharding: Its sharding.
      read: Returns the shard between limits `(start, stop)` of each axis. It is called once for all devices of this
        process that hold the same shard. New arrays in it are on the first of them.
    """
    devices_of: dict[tuple, list[jax.Device]] = {}
    for device, part in sharding.addressable_devices_indices_map(shape).items():
        devices_of.setdefault(tuple(axis.indices(n)[:2] for axis, n in zip(part or (), shape)), []).append(device)
    arrays = []
    for limits, devices in devices_of.items():
        # With the mesh of a run, new arrays would be on all of its devices.
        with jax.set_mesh(Mesh(np.array(devices[:1]), ("device",))):
            values = read(limits)
        for device in devices:
            one_device = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
            arrays.append(jax.device_put(values, one_device))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
