"""What the text of a compiled module says of data that moves between devices."""

import dataclasses
import math
import re

SUMS = ("all-reduce", "reduce-scatter")
MOVES = ("all-gather", "all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(rf"= (.*?) ({'|'.join((*SUMS, *MOVES))})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An array that a collective operation makes on each device.

    Attributes:
      kind: The operation.
      dtype: Of its elements, in XLA's words.
      shape: Of what a device has afterwards.
      once: Whether it is in the entry computation; the others are loops' bodies.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    once: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def moves(self) -> bool:
        """Whether data is moved as it is, and not summed."""
        return self.kind in MOVES


def collectives(text: str) -> list[Collective]:
    """All collectives of a module; one that has several operands is as many."""
    results, once = [], False
    for line in text.splitlines():
        if head := HEAD.match(line):
            once = head[1] is not None
        elif match := LINE.search(line):
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                shape = tuple(int(size) for size in sizes.split(",") if size)
                results.append(Collective(match[2], dtype, shape, once))
    return results


def moved_tokens(text: str, width: int, rank: int) -> list[tuple[int, ...]]:
    """The shapes of what is moved as it is and is larger than a vector, but for what has the rank for an axis."""
    return sorted(one.shape for one in collectives(text) if one.moves and rank not in one.shape and one.size > width)
