"""Reads several classification tasks on the same kind of text from one table for each split."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.tasks.examples import Examples, read_lines

SHIPPED = {"debian_fields": Path(__file__).parent / "debian_fields"}
_ORIGIN = ("source", "package")
_SPLITS = ("train", "validation", "test")


def load(directory: str | Path, limits: Mapping[str, int]) -> dict[str, dict[str, Examples]]:
    """Reads all splits of all tasks.

    The directory contains `train.tsv`, `validation.tsv` and `test.tsv`, or these as `.tsv.gz`, with a header. The last
    column is the text. Every other column, except `source` and `package`, is a task with the labels of the rows; it is
    empty for rows that are no example of the task.

    Args:
      directory: A directory, or the name of the shipped one: `debian_fields`.
      limits: The number of examples of each task by split, from the beginning.

    Returns:
      The examples by task and split. The labels of a task are those of its training examples, sorted.

    Raises:
      UserError: A file is missing or malformed, a task has too few examples, or a label occurs in no training example.
    """
    directory = SHIPPED.get(str(directory), Path(directory))
    if not directory.is_dir():
        raise UserError(f"{directory}: no such data directory")
    tables = {split: _Table.read(directory, split) for split in _SPLITS}
    tasks = tables["train"].tasks
    return {
        task: {split: tables[split].examples(task, limits[split], tables["train"]) for split in tables}
        for task in tasks
    }


class _Table:
    """A table.

    Attributes:
      path: The file.
      tasks: The columns of labels.
    """

    def __init__(self, path: Path, header: list[str], rows: list[list[str]]):
        self.path, self._header, self._rows = path, header, rows
        self.tasks = [name for name in header[:-1] if name not in _ORIGIN]

    @classmethod
    def read(cls, directory: Path, split: str) -> "_Table":
        """Reads the table of a split."""
        paths = [directory / f"{split}{suffix}" for suffix in (".tsv", ".tsv.gz")]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"{directory}: no {paths[0].name} or {paths[1].name} in this data directory")
        header, *rows = [line.split("\t") for line in read_lines(path)] or [[]]
        table = cls(path, header, rows)
        if not table.tasks or not rows:
            raise UserError(f"{path}: expected a header with a column for each task and one for the text, and rows")
        for number, row in enumerate(rows, start=2):
            if len(row) != len(header) or not row[-1].strip():
                raise UserError(
                    f"{path}, line {number}: expected {len(header)} tab-separated columns and a text in the last one"
                )
        return table

    def names(self, task: str) -> tuple[str, ...]:
        """Returns the labels of a task, sorted."""
        return tuple(sorted({label for label, _ in self._examples(task)}))

    def examples(self, task: str, limit: int, train: "_Table") -> Examples:
        """Returns the first examples of a task, with the labels of its training examples."""
        names, rows = train.names(task), self._examples(task)
        if len(names) < 2:
            raise UserError(f"{train.path}: expected at least two different labels in the column {task}")
        if len(rows) < limit:
            raise UserError(f"{self.path}: expected at least {limit} rows with a label of {task}, got {len(rows)}")
        unknown = sorted({label for label, _ in rows} - {*names})
        if unknown:
            raise UserError(f"{self.path}: the label {unknown[0]!r} of {task} occurs in no row of {train.path}")
        labels = np.array([names.index(label) for label, _ in rows[:limit]], np.int32)
        return Examples(tuple(text for _, text in rows[:limit]), labels, names)

    def _examples(self, task: str) -> list[tuple[str, str]]:
        if task not in self._header:
            raise UserError(f"{self.path}: no column {task}")
        column = self._header.index(task)
        return [(row[column], row[-1]) for row in self._rows if row[column]]
