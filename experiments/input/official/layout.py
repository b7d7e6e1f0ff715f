"""What an official data set consists of: the files of its splits, their rows, and the examples that these give."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.input.json_rows import JsonRows
from experiments.input.opening import open_content
from experiments.input.records import Record
from experiments.input.strict_json import kind

Rows = Sequence[tuple[str, Any]]
"""The location and the content of each row."""


@dataclass(frozen=True)
class Example:
    """An example of a task.

    Attributes:
      record: What a decoder learns: a prompt and its answer, or a conversation.
      answer: What the metrics of the task compare a generated answer with: all reference answers as a tuple of texts,
        or the label, choice or query of a task that has its own metrics (:mod:`experiments.evaluation.tasks`).
    """

    record: Record
    answer: Any


def json_rows(paths: Sequence[Path], split: str) -> Rows:
    """Opens JSON files with an object per line, or an array of objects. A row is parsed when it is read.

    Raises:
      UserError: A file cannot be read, or its rows cannot be located.
    """
    return _JsonFiles([JsonRows(open_content(path), split) for path in paths])


class _JsonFiles(Sequence[tuple[str, Any]]):
    """The rows of several files."""

    def __init__(self, files: Sequence[JsonRows]):
        self._files, self._ends = files, list(itertools.accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        rows = self._files[number]
        position = index - self._ends[number] + len(rows)
        return rows.location(position), rows[position]


@dataclass(frozen=True)
class Layout:
    """A data set as it is distributed.

    Attributes:
      name: The name, as in `squad:DIRECTORY`.
      files: For each split its files relative to the directory, or patterns of their names; all of them are needed.
        Several alternatives are tried in their order.
      example: Converts a row at a location to an example.
      rows: Reads the files of a split.
      matches: Whether the first file has the content of this data set, if its name does not say so.
      folders: The names of its directory in the distribution, next to those of other tasks.
      hub: The data set on the Hugging Face Hub, as in `ORG/NAME` or `ORG/NAME:CONFIG:`; None if there is none that the
        `datasets` library reads.
      hub_splits: The Hub's names of splits that it names in a way of its own.
      hub_rows: Converts the Hub's rows to those of the files.
      unlabeled: The splits whose answers are secret.
    """

    name: str
    files: Mapping[str, Sequence[Sequence[str]]]
    example: Callable[[Any, str], Example]
    rows: Callable[[Sequence[Path], str], Rows] = json_rows
    matches: Callable[[Path], bool] = lambda path: True
    folders: Sequence[str] = ()
    hub: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    hub_rows: Callable[[Iterable[tuple[str, Any]]], Rows] = list
    unlabeled: frozenset[str] = frozenset()

    def home(self, directory: Path) -> Path:
        """Returns the directory of the files: the given one, or the one of this task in it."""
        return next((directory / name for name in self.folders if (directory / name).is_dir()), directory)

    def paths(self, directory: Path, split: str) -> list[Path]:
        """Returns the files of a split.

        Raises:
          UserError: Files are missing.
        """
        if split not in self.files:
            raise UserError(f"{self.name}: no split {split}; expected one of {', '.join(self.files)}")
        alternatives = [{name: sorted(directory.glob(name)) for name in names} for names in self.files[split]]
        nearest = min(alternatives, key=lambda paths: _count_missing(paths) / len(paths))
        if missing := [name for name, paths in nearest.items() if not paths]:
            others = [" and ".join(names) for names in self.files[split]]
            raise UserError(
                f"{directory}: no {' and '.join(missing)}, which the split {split} of {self.name} needs"
                + (f"; expected {', or '.join(others)}" if len(others) > 1 else "")
                + f"; the directory has {_listing(directory)}"
            )
        return [paths[0] for paths in nearest.values()]

    def splits(self, directory: Path) -> list[str]:
        """Returns the splits whose files are there."""

        def is_there(names: Sequence[str]) -> bool:
            return all(any(directory.glob(name)) for name in names)

        return [split for split, alternatives in self.files.items() if any(map(is_there, alternatives))]

    def recognizes(self, directory: Path) -> bool:
        """Whether a directory holds this data set, according to its files."""
        splits = self.splits(directory)
        return bool(splits) and self.matches(self.paths(directory, splits[0])[0])


def value(row: Any, name: str, expected: type | tuple[type, ...], where: str) -> Any:
    """Returns a value of a row.

    Raises:
      UserError: The row does not have it, or it is of another type.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: got {kind(row)}, expected an object with {name}")
    if name not in row:
        raise UserError(f"{where}: no {name}; got {', '.join(map(str, row)) or 'nothing'}")
    if not isinstance(row[name], expected) or (isinstance(row[name], bool) and expected is not bool):
        first = expected if isinstance(expected, type) else expected[0]
        raise UserError(f"{where}: {name} is {kind(row[name])}, expected {_NAMES[first]}")
    return row[name]


_NAMES = {str: "a string", list: "a list", dict: "an object", int: "a number", bool: "a boolean"}
_HEAD = 1 << 16


def head(path: Path) -> str:
    """Returns the beginning of a text file, to recognize its content; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD).decode("utf-8", "replace").removeprefix("\ufeff")
    except OSError:
        return ""


def _count_missing(paths: Mapping[str, Sequence[Path]]) -> int:
    return sum(not files for files in paths.values())


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "no files"
