"""The numbering of dropout masks: a mask depends on its key, the path, and the index of the use in the whole function.

Sub-jaxprs take the index of their first use and return the number of their uses, so that `jit`, `checkpoint` or a scan
around a layer changes no mask.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

Numbers = Mapping[str, Any]
"""For each path, the index of the next use that draws a mask: a `uint32` scalar, traced inside sub-jaxprs."""

UNKNOWN_COUNT = 0x9E3779B1
"""The number of uses that a `while` loop counts for, since its iterations are not known when it is traced.

Multiples of 2³² divided by the golden ratio stay far apart modulo 2³², so that the uses of several loops do not meet.
"""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Draws:
    """The number of masks that a body draws for each path. Static, so that a cached `jit` can return it."""

    counts: tuple[tuple[str, int], ...]

    @classmethod
    def most(cls, draws: "Sequence[Draws]") -> "Draws":
        """The largest number for each path: an upper bound for branches, one of which runs."""
        paths = dict.fromkeys(path for one in draws for path, _ in one.counts)
        return cls(tuple((path, max(dict(one.counts).get(path, 0) for one in draws)) for path in paths))

    def times(self, count: int) -> "Draws":
        """The masks of `count` iterations."""
        return Draws(tuple((path, number * count) for path, number in self.counts))

    def unknown_times(self) -> "Draws":
        """The masks of a loop with an unknown number of iterations."""
        return Draws(tuple((path, UNKNOWN_COUNT) for path, number in self.counts if number))

    def after(self, numbers: Numbers) -> Numbers:
        """The indices of the next uses, once these masks are drawn."""
        counts = dict(self.counts)
        return {path: _sum(number, counts.get(path, 0)) for path, number in numbers.items()}


def _sum(number: Any, count: int) -> Any:
    """An index plus a count, modulo 2³²."""
    if isinstance(number, jax.Array):
        return number + np.uint32(count % 2**32)
    return np.uint32((int(number) + count) % 2**32)
