"""Slices of TPUs that are not here, as devices to compile for."""

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
      name: `v5e:4x4`.
      chip: Of which it is made.
      sizes: Chips along each axis.
      devices: For `jax.sharding.Mesh`; each is a chip.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def wraps(self) -> bool:
        """Whether the chips at the ends of an axis are linked, which makes a torus of the mesh.

        In two dimensions along the axes of 16 chips, which :meth:`links` knows; in three where each axis is a multiple
        of 4.
        """
        return len(self.sizes) == 3 and all(size % _CUBE == 0 for size in self.sizes)

    def links(self, devices: Sequence[Any]) -> int:
        """The links that the worst placed of these chips has to the others, if they stand together.

        One along each axis in which they differ, two where that axis is a ring and they are all of it.
        """
        coordinates = np.array([device.coords for device in devices])
        total = 0
        for axis, size in enumerate(self.sizes):
            there = len(set(coordinates[:, axis].tolist()))
            ring = there == size and (self.wraps or (len(self.sizes) == 2 and size == 16)) and size > 2
            total += 0 if there == 1 else 2 if ring else 1
        return max(total, 1)


def names(chip: Chip) -> list[str]:
    """The slices of a TPU that Google documents, smallest first."""
    if chip.axes == 2:
        shapes = list(_FLAT)
    else:
        along = range(_CUBE, 25, _CUBE)
        cubes = itertools.combinations_with_replacement(along, 3)
        shapes = [*_SMALL, *sorted((cube for cube in cubes if math.prod(cube) <= _MOST[chip.name]), key=math.prod)]
    return [f"{chip.name}:{'x'.join(map(str, shape))}" for shape in shapes]


def describe(name: str) -> Topology:
    """The chips of a slice.

    Args:
      name: `v5e:4x4`: generation and chips along each axis.

    Raises:
      UserError: There is no such slice (the message names the nearest), or no compiler for TPUs.
    """
    chip = _checked(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu, which the `tpu` extra installs: uv sync --extra tpu")
    without_tpu()
    sizes = tuple(int(size) for size in name.partition(":")[2].split("x"))
    given: dict[str, Any] = {}
    if chip.name == "v4":  # the two cores of a chip as one device, as JAX has them on a v4
        given["chip_config_name"] = "megacore"
    if math.prod(sizes) == 1:
        given["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **given).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"libtpu does not describe {name}: {str(error).splitlines()[0]}") from None
    return Topology(name, chip, sizes, devices)


def without_tpu() -> None:
    """Settings with which libtpu compiles where there is no TPU; JAX's own computations are the CPU's."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to lock
    # What libtpu else complains about at length; the slice that is described does not depend on it.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    jax.config.update("jax_platforms", "cpu")


def _checked(name: str) -> Chip:
    """The chip of a slice that there is."""
    known = [slice_ for chip in chips.TPUS for slice_ in names(chip)]
    generation, _, _ = name.partition(":")
    chip = chips.find_tpu(generation)
    if name in known and chip is not None:
        return chip
    found = _NAME.match(name)
    if chip is None or found is None:
        kinds = ", ".join(chip.name for chip in chips.TPUS)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise UserError(f"--topology is GENERATION:AxB or AxBxC ({kinds}), as v5e:4x4, not {name!r}{hint}")
    count = math.prod(int(size) for size in found[2].split("x"))
    near = min(names(chip), key=lambda other: abs(math.log(count / _count(other))))
    raise UserError(f"there is no slice {name} ({count} chips along {found[2].count('x') + 1} axes); nearest is {near}")


def _count(name: str) -> int:
    return math.prod(int(size) for size in name.partition(":")[2].split("x"))
