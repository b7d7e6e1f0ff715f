"""A table of how many records of each file are used, truncated or skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.input.answer_batches import AnswerBatches
from experiments.input.checking import Findings
from experiments.input.packing import Packed
from experiments.input.sources import Records

_ROWS = 12  # files with a row of their own
_REASONS = 6  # reasons to print
_COUNTS = ("records", "used", "passes", "truncated", "malformed", "unused")


@dataclass(frozen=True)
class Usage:
    """The usage of the records of one file or data set.

    Attributes:
      name: The name of the file.
      forms: The formats of its records.
      records: Number of records.
      used: Number of records that are trained on or evaluated.
      passes: Number of times that an epoch uses one of them; more than `used` for a weight above 1.
      truncated: Number of used records that are truncated.
      malformed: Number of records that cannot be read or encoded.
      unused: Number of records that are not used because of the length.
      reasons: Error messages of the first malformed records.
      unused_reason: Why records are unused, followed by the length in a sentence.
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
    unused_reason: str = Packed.unused_reason


def usage(records: Records, findings: Sequence[Findings], packed: Packed | AnswerBatches) -> list[Usage]:
    """Computes the usage of each source's records.

    Args:
      records: The records in `packed`.
      findings: One per source, from :func:`experiments.input.checking.check_records`.
      packed: The batches.
    """
    data = packed.data
    used, truncated, skipped = (np.zeros(len(records), bool) for _ in range(3))
    used[data.owners[~packed.unused]] = True
    truncated[data.owners[packed.truncated]] = True
    skipped[np.array(list(data.skipped), int)] = True
    rows = []
    for index, (source, result) in enumerate(zip(records.sources, findings)):
        in_source = records.source_of == index

        def count(selected: np.ndarray, in_source: np.ndarray = in_source) -> int:
            return len(np.unique(records.number_of[selected & in_source]))

        reasons = [reason for number, reason in data.skipped.items() if in_source[number] and reason]
        rows.append(
            Usage(
                name=source.name,
                forms=tuple(result.forms),
                records=len(source),
                used=count(used),
                passes=int(np.sum(used & in_source)),
                truncated=count(truncated),
                malformed=result.skipped + count(skipped),
                unused=count(~used & ~skipped),
                reasons=(*result.reasons, *reasons),
                unused_reason=packed.unused_reason,
            )
        )
    return rows


def show(console: Console, splits: Mapping[str, Sequence[Usage]], length: int, longest: int = 0) -> None:
    """Prints a table with a row for each file, followed by the reasons for skipping or truncating records.

    Args:
      console: The output.
      splits: The usage of each split's files.
      length: Tokens per sequence.
      longest: The length that would truncate no record.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data", overflow="fold")
    table.add_column("format", overflow="fold")
    rows = [row for rows in splits.values() for row in rows]
    repeated = any(row.passes != row.used for row in rows)
    for name in ("records", "used", *(["per epoch"] if repeated else []), "truncated", "skipped"):
        table.add_column(name, justify="right")
    for split, files in splits.items():
        table.add_row(Text(split, style="bold"))
        names = [_short(row.name) for row in files]
        for row, full, name in zip(_condense(files), files, names):
            numbers = [row.records, row.used, *([row.passes] if repeated else [])]
            numbers += [row.truncated, row.malformed + row.unused]
            title = row.name if names.count(name) > 1 or row is not full else name
            table.add_row(Text(f"  {title}"), "\n".join(row.forms), *(f"{number:,}" for number in numbers))
    console.print(table, highlight=False)
    for split, files in splits.items():
        for line in _notes(files, length):
            console.print(f"{split}: {line}", highlight=False, soft_wrap=True)
        if line := _truncation(files, length, longest):
            console.print(f"{split}: {line}", style="bold yellow", highlight=False, soft_wrap=True)


def _short(name: str) -> str:
    """Returns a file's name without directories; for Arrow files of `datasets`, the split's directory is kept."""
    path = Path(name)
    if not path.exists():
        return name
    return f"{path.parent.name}/{path.name}" if path.suffix == ".arrow" else path.name


def _condense(files: Sequence[Usage]) -> list[Usage]:
    """Combines all but the first files into one row."""
    if len(files) <= _ROWS:
        return list(files)
    others = files[_ROWS - 1 :]
    sums = {name: sum(getattr(row, name) for row in others) for name in _COUNTS}
    forms = tuple(dict.fromkeys(form for row in others for form in row.forms))
    more = Usage(f"{len(others):,} more files", forms, reasons=(), unused_reason=files[0].unused_reason, **sums)
    return [*files[: _ROWS - 1], more]


def _notes(files: Sequence[Usage], length: int) -> list[str]:
    malformed, unused = (sum(getattr(row, name) for row in files) for name in ("malformed", "unused"))
    reasons = [reason for row in files for reason in row.reasons][:_REASONS]
    lines = [f"skipped: {reason}" for reason in reasons]
    if malformed > len(reasons):
        lines.append(f"skipped: {malformed - len(reasons):,} more malformed records")
    if unused:
        lines.append(f"skipped: {unused:,} {files[0].unused_reason} {length:,} tokens")
    return lines


def _truncation(files: Sequence[Usage], length: int, longest: int) -> str | None:
    """Describes how many records are too long; None if none is."""
    truncated, unused, records = (
        sum(getattr(row, name) for row in files) for name in ("truncated", "unused", "records")
    )
    hint = f"--length {longest} keeps everything"
    if truncated:
        share = f"{truncated:,} of {records:,} records ({truncated / records:.0%})"
        line = f"warning: {share} are longer than {length:,} tokens and lose their end, which is what they teach"
        return f"{line}; {hint}" if longest > length else line
    return f"warning: {hint}" if unused and longest > length else None
