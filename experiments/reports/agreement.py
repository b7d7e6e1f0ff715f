"""By how much two ways to compute the same thing differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Agreement:
    """One comparison.

    Attributes:
      what: What is compared with base and adapter.
      where: In what.
      same: How many numbers are the same; None where it is asked how far they are apart.
      count: How many there are.
      difference: The largest absolute difference; None where it is asked how many are the same.
    """

    what: str
    where: str
    same: int | None = None
    count: int | None = None
    difference: float | None = None

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.difference is not None:
            return "the same" if self.difference == 0 else f"{self.difference:.1e} apart at most"
        return (
            f"all {self.count:,} the same" if self.same == self.count else f"{self.same:,} of {self.count:,} the same"
        )


def agreement_table(found: Sequence[Agreement]) -> Table:
    """A line a comparison."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("against base and adapter", "compared", "result"):
        shown.add_column(name)
    for one in found:
        shown.add_row(one.what, one.where, one.verdict)
    return shown
