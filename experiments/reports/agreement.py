"""Comparisons of two ways to compute the same result."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class Agreement:
    """One comparison.

    Attributes:
      what: What is compared with base and adapter.
      where: The quantity that is compared.
      same: Number of equal values; None if `difference` is set.
      count: Number of values.
      difference: The largest absolute difference; None if `same` is set.
    """

    what: str
    where: str
    same: int | None = None
    count: int | None = None
    difference: float | None = None

    @property
    def verdict(self) -> str:
        """The result as text."""
        if self.difference is not None:
            return "equal" if self.difference == 0 else f"differ by at most {self.difference:.1e}"
        return f"all {self.count:,} equal" if self.same == self.count else f"{self.same:,} of {self.count:,} equal"


def agreement_table(agreements: Sequence[Agreement]) -> Table:
    """Returns a table with a line for each comparison."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("against base and adapter", "compared", "result"):
        table.add_column(name)
    for agreement in agreements:
        table.add_row(agreement.what, agreement.where, agreement.verdict)
    return table
