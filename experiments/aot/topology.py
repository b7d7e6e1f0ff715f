"""TPU slices as devices to compile for, without TPUs."""

import dataclasses
import difflib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from experiments.errors import UserError
from experiments.training import chips
from experiments.training.chips import Chip

_NAME = re.compile(r"^(v\d+[a-z]*):(\d+(?:x\d+)+)$")
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_MOST = {"v4": 4096, "v5p": 6144}
_CUBE = 4


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice.

    Attributes:
      name: The name, such as `v5e:4x4`.
      chip: The kind of its chips.
      sizes: The number of chips along each axis.
      devices: The devices for `jax.sharding.Mesh`, one per chip.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def wraps(self) -> bool:
        """Whether the chips at the ends of each axis are linked, so that the slice is a torus.

        True in three dimensions if each axis is a multiple of 4. In two dimensions only axes of 16 chips wrap around,
        which :meth:`links` takes into account.
        """
        return len(self.sizes) == 3 and all(size % _CUBE == 0 for size in self.sizes)

    def links(self, devices: Sequence[Any]) -> int:
        """Returns the number of links between one of the given contiguous chips and the others, at least.

        One along each axis in which they differ, two if that axis is a ring and they cover it.
        """
        coordinates = np.array([device.coords for device in devices])
        total = 0
        for axis, size in enumerate(self.sizes):
            count = len(set(coordinates[:, axis].tolist()))
            ring = count == size and (self.wraps or (len(self.sizes) == 2 and size == 16)) and size > 2
            total += 0 if count == 1 else 2 if ring else 1
        return max(total, 1)


def names(chip: Chip) -> list[str]:
    """Returns the documented slices of a TPU, smallest first."""
    if chip.axes == 2:
        shapes = list(_FLAT)
    else:
        along = range(_CUBE, 25, _CUBE)
        cubes = itertools.combinations_with_replacement(along, 3)
        shapes = [*_SMALL, *sorted((cube for cube in cubes if math.prod(cube) <= _MOST[chip.name]), key=math.prod)]
    return [f"{chip.name}:{'x'.join(map(str, shape))}" for shape in shapes]


def describe(name: str) -> Topology:
    """Returns the slice of a name.

    Args:
      name: The generation and the number of chips along each axis, such as `v5e:4x4`.

    Raises:
      UserError: The slice does not exist (the message names the nearest), or libtpu is not installed.
    """
    chip = _find_chip(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, which the `tpu` extra installs: uv sync --extra tpu")
    without_tpu()
    sizes = tuple(int(size) for size in name.partition(":")[2].split("x"))
    options: dict[str, Any] = {}
    if chip.name == "v4":  # the two cores of a chip are one device, as in JAX on a v4
        options["chip_config_name"] = "megacore"
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu does not describe {name}: {str(error).splitlines()[0]}") from None
    return Topology(name, chip, sizes, devices)


def without_tpu() -> None:
    """Configures libtpu to compile without a TPU, and JAX to compute on the CPU."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU to lock
    # Suppresses warnings of libtpu; the described slice does not depend on these values.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")


def _find_chip(name: str) -> Chip:
    """Returns the chip of a slice; raises a UserError if the slice does not exist."""
    slices = [slice_ for chip in chips.TPUS for slice_ in names(chip)]
    generation, _, _ = name.partition(":")
    chip = chips.find_tpu(generation)
    if name in slices and chip is not None:
        return chip
    match = _NAME.match(name)
    if chip is None or match is None:
        kinds = ", ".join(chip.name for chip in chips.TPUS)
        near = difflib.get_close_matches(name, slices, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"--topology is GENERATION:AxB or AxBxC ({kinds}), as v5e:4x4, not {name!r}{hint}")
    count = math.prod(int(size) for size in match[2].split("x"))
    near = min(names(chip), key=lambda other: abs(math.log(count / _count(other))))
    raise UserError(f"there is no slice {name} ({count} chips along {match[2].count('x') + 1} axes); nearest is {near}")


def _count(name: str) -> int:
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))
