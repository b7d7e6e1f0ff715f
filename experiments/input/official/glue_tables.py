"""The tables of GLUE, in which quotes have no meaning, and their counterparts on the Hub."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.input.official.glue_tasks import Task
from experiments.input.official.layout import Rows, value
from experiments.tasks.examples import read_lines

PARAPHRASES = "msr_paraphrase_train.txt"
_IDS = ("#1 ID", "#2 ID")


def read_table(path: Path, columns: Sequence[str] = ()) -> Rows:
    """Reads the rows of a table as dicts.

    Args:
      path: The file.
      columns: The columns of a table without a header.

    Raises:
      UserError: The file is missing or empty, or a line has another number of columns.
    """
    lines = read_lines(path)
    if len(lines) < (1 if columns else 2):
        raise UserError(f"{path}: the file is empty" + (" except for its header" if lines else ""))
    names, start = columns or lines[0].split("\t"), 0 if columns else 1
    rows = []
    for number, line in enumerate(lines[start:], start=start + 1):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise UserError(
                f"{path}, line {number}: {len(fields)} columns, expected the {len(names)} columns {', '.join(names)}"
            )
        rows.append((f"{path}, line {number}", dict(zip(names, fields))))
    return rows


def reader(task: Task) -> Callable[[Sequence[Path], str], Rows]:
    """Returns a function from the files of a split to their rows."""

    def rows(paths: Sequence[Path], split: str) -> Rows:
        if split != "test" and task.without_header:
            return read_table(paths[0], task.without_header)
        rows = read_table(paths[0])
        is_split = paths[0].name == PARAPHRASES
        for name in (*task.texts, *(() if split == "test" else (task.label,)), *(_IDS if is_split else ())):
            value(rows[0][1], name, str, f"{paths[0]}, line 1")
        if not is_split:
            return rows
        held_out = {tuple(line.split("\t")) for line in read_lines(paths[1])}
        return [row for row in rows if (tuple(row[1][name] for name in _IDS) in held_out) == (split == "validation")]

    return rows


def hub_reader(task: Task) -> Callable[[Iterable[tuple[str, Any]]], Rows]:
    """Returns a function from rows of the Hub, whose labels are numbers, to those of the files."""

    def rows(table: Iterable[tuple[str, Any]]) -> Rows:
        result = []
        for where, row in table:
            names = zip(task.texts, task.hub_texts or task.texts)
            content = {column: value(row, name, str, where) for column, name in names}
            label = value(row, "label", (int, float), where)
            if label >= 0:
                content[task.label] = task.names[int(label)] if task.names and not task.numbered else str(label)
            result.append((where, content))
        return result

    return rows
