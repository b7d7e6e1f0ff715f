"""WikiSQL: questions on a table, and the SQL queries that answer them.

References:
  Zhong et al., `Seq2SQL <https://arxiv.org/abs/1709.00103>`_, 2017
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.input.official import sql
from experiments.input.official.layout import Example, Layout, Rows, json_rows, value
from experiments.input.records import Completion
from experiments.input.strict_json import kind


@dataclass(frozen=True)
class Answer:
    """The right query on a table.

    Attributes:
      query: The query.
      columns: The names of the columns, all different.
      table: The id of the table.
      database: The file of tables in SQLite's format.
    """

    query: sql.Query
    columns: tuple[str, ...]
    table: str
    database: Path


def _rows(paths: Sequence[Path], split: str) -> Rows:
    """Adds a question's table, with its columns and its file, to the question."""
    columns = {}
    for where, table in json_rows(paths[1:], split):
        header = value(table, "header", list, where)
        columns[value(table, "id", str, where)] = sql.column_names([str(name) for name in header])
    database = paths[0].with_suffix(".db")
    if not database.is_file():
        raise UserError(f"{database}: no such file; WikiSQL's queries are executed on it, and it is next to {paths[0]}")
    rows = []
    for where, row in json_rows(paths[:1], split):
        table = value(row, "table_id", str, where)
        if table not in columns:
            raise UserError(f"{where}: the table {table} is not in {paths[1]}")
        rows.append((where, (row, columns[table], database)))
    return rows


def _example(row: tuple[Any, tuple[str, ...], Path], where: str) -> Example:
    content, columns, database = row
    form = value(content, "sql", dict, where)
    selected, aggregate = (value(form, name, int, where) for name in ("sel", "agg"))
    query = sql.Query(selected, aggregate, tuple(map(tuple, _conditions(form, where))))
    _check(query, len(columns), where)
    prompt = f"table: {', '.join(columns)}\nquestion: {value(content, 'question', str, where).strip()}\nSQL:"
    answer = Answer(query, columns, content["table_id"], database)
    return Example(Completion(prompt, f" {sql.write(query, columns)}"), answer)


def _conditions(form: Any, where: str) -> list[list[Any]]:
    conditions = value(form, "conds", list, where)
    if wrong := [parts for parts in conditions if not isinstance(parts, list)]:
        raise UserError(f"{where}: a condition is {kind(wrong[0])}, expected a list")
    return conditions


def _check(query: sql.Query, columns: int, where: str) -> None:
    """Raises a UserError if a number of a query is out of range."""
    numbers = [("sel", query.select, columns), ("agg", query.aggregate, len(sql.AGGREGATES))]
    for parts in query.conditions:
        if len(parts) != 3 or not isinstance(parts[2], str | int | float):
            raise UserError(f"{where}: the condition {list(parts)} is not [column, operator, text or number]")
        numbers += [("conds", parts[0], columns), ("conds", parts[1], len(sql.OPERATORS))]
    for name, number, count in numbers:
        if not isinstance(number, int) or not 0 <= number < count:
            raise UserError(f"{where}: {name} has the number {number}, expected one from 0 to {count - 1}")


LAYOUT = Layout(
    "wikisql",
    {
        "train": [["train.jsonl", "train.tables.jsonl"]],
        "validation": [["dev.jsonl", "dev.tables.jsonl"]],
        "test": [["test.jsonl", "test.tables.jsonl"]],
    },
    _example,
    _rows,
)
