"""What becomes of the records of each file, as one table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.input.checking import Findings
from experiments.input.packing import Packed
from experiments.input.sources import Records

_ROWS = 12  # of files that are shown by themselves
_REASONS = 6  # that are shown
_COUNTS = ("records", "used", "passes", "truncated", "malformed", "unused")


@dataclass(frozen=True)
class Usage:
    """Of one file or data set.

    Attributes:
      name: The file's.
      forms: The formats of its records.
      records: How many it has.
      used: How many are trained on or evaluated.
      passes: How often a pass goes over them in all: more than `used` for a weight above 1.
      truncated: How many of those are cut at the end.
      malformed: How many cannot be read or encoded.
      unused: How many have nothing to learn within the length.
      reasons: Of the first malformed ones.
    """

    name: str
    forms: tuple[str, ...]
    records: int
    used: int
    passes: int
    truncated: int
    malformed: int
    unused: int
    reasons: tuple[str, ...]


def usage(records: Records, findings: Sequence[Findings], packed: Packed) -> list[Usage]:
    """What became of the records of each source.

    Args:
      records: Those that were packed.
      findings: Of their sources, from :func:`experiments.input.checking.checked`.
      packed: Their batches.
    """
    data = packed.data
    used, truncated, skipped = (np.zeros(len(records), bool) for _ in range(3))
    used[data.owners[~packed.unused]] = True
    truncated[data.owners[packed.truncated]] = True
    skipped[np.array(list(data.skipped), int)] = True
    rows = []
    for index, (source, read) in enumerate(zip(records.sources, findings)):
        here = records.source_of == index

        def count(which: np.ndarray, here: np.ndarray = here) -> int:
            return len(np.unique(records.number_of[which & here]))

        reasons = [reason for number, reason in data.skipped.items() if here[number] and reason]
        rows.append(
            Usage(
                name=source.name,
                forms=tuple(read.forms),
                records=len(source),
                used=count(used),
                passes=int(np.sum(used & here)),
                truncated=count(truncated),
                malformed=read.skipped + count(skipped),
                unused=count(~used & ~skipped),
                reasons=(*read.reasons, *reasons),
            )
        )
    return rows


def show(console: Console, splits: Mapping[str, Sequence[Usage]], length: int) -> None:
    """Prints a table with a row for each file, and under it why records were skipped or truncated.

    Args:
      console: Where to.
      splits: The files by what they are used for.
      length: Tokens of a sequence.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data", overflow="fold")
    table.add_column("format", overflow="fold")
    rows = [row for rows in splits.values() for row in rows]
    repeated = any(row.passes != row.used for row in rows)
    for name in ("records", "used", *(["a pass"] if repeated else []), "truncated", "skipped"):
        table.add_column(name, justify="right")
    for split, files in splits.items():
        table.add_row(Text(split, style="bold"))
        names = [_short(row.name) for row in files]
        for row, full, name in zip(_condensed(files), files, names):
            numbers = [row.records, row.used, *([row.passes] if repeated else [])]
            numbers += [row.truncated, row.malformed + row.unused]
            shown = row.name if names.count(name) > 1 or row is not full else name
            table.add_row(Text(f"  {shown}"), "\n".join(row.forms), *(f"{number:,}" for number in numbers))
    console.print(table, highlight=False)
    for split, files in splits.items():
        for line in _notes(files, length):
            console.print(f"{split}: {line}", highlight=False, markup=False, soft_wrap=True)


def _short(name: str) -> str:
    """A file's name without its directories, but for what `datasets` calls data-00000-of-00001 in a split's."""
    path = Path(name)
    if not path.exists():
        return name
    return f"{path.parent.name}/{path.name}" if path.suffix == ".arrow" else path.name


def _condensed(files: Sequence[Usage]) -> list[Usage]:
    """The first files, and the others as one."""
    if len(files) <= _ROWS:
        return list(files)
    others = files[_ROWS - 1 :]
    sums = {name: sum(getattr(row, name) for row in others) for name in _COUNTS}
    forms = tuple(dict.fromkeys(form for row in others for form in row.forms))
    return [*files[: _ROWS - 1], Usage(f"{len(others):,} more files", forms, reasons=(), **sums)]


def _notes(files: Sequence[Usage], length: int) -> list[str]:
    malformed, unused, truncated = (sum(getattr(row, n) for row in files) for n in ("malformed", "unused", "truncated"))
    reasons = [reason for row in files for reason in row.reasons][:_REASONS]
    lines = [f"skipped: {reason}" for reason in reasons]
    if malformed > len(reasons):
        lines.append(f"skipped: {malformed - len(reasons):,} more that are malformed")
    if unused:
        lines.append(f"skipped: {unused:,} with nothing to learn within {length:,} tokens")
    if truncated:
        lines.append(f"truncated: {truncated:,} that are longer than {length:,} tokens")
    return lines
