"""The metrics of generated SQL: whether a query has the right logical form, and whether it has the right result.

References:
  Zhong et al., `Seq2SQL <https://arxiv.org/abs/1709.00103>`_, 2017, §4
"""

import contextlib
import dataclasses
import re
import sqlite3
from collections.abc import Sequence
from typing import Any

from experiments.errors import UserError
from experiments.input.official import sql
from experiments.input.official.wikisql import Answer
from experiments.tasks.sql_questions import tables

_STATEMENT = re.compile(r"\bselect\b[^;`]*", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def score(texts: Sequence[str], answers: Sequence[Answer]) -> dict[str, float]:
    """Returns the accuracies of logical forms and of results on WikiSQL, from 0 to 100.

    The order of conditions and the case of values do not matter.

    Args:
      texts: The generated SQL.
      answers: The right queries.

    Raises:
      UserError: A table is not in its database, or the database is missing.
    """
    forms, results = [], []
    with contextlib.ExitStack() as stack:
        databases = {path: stack.enter_context(_open(path)) for path in {answer.database for answer in answers}}
        for text, answer in zip(texts, answers, strict=True):
            query, database = sql.parse(text, answer.columns), databases[answer.database]
            try:
                expected = execute(database, answer.table, answer.query)
            except (sqlite3.Error, ValueError) as error:
                raise UserError(f"{answer.database}: the right query fails on table {answer.table} ({error})") from None
            forms.append(query is not None and _form(_as_texts(query)) == _form(_as_texts(answer.query)))
            results.append(query is not None and _result(database, answer.table, query) == expected)
    return _accuracies(forms, results)


def score_tables(texts: Sequence[str], references: Sequence[str], rows: Sequence[tables.Table]) -> dict[str, float]:
    """Returns the accuracies of logical forms and of results on tables of `sql_questions`, from 0 to 100.

    Args:
      texts: The answers of a model.
      references: The right queries.
      rows: The table of each.
    """
    forms, results = [], []
    for text, reference, table in zip(texts, references, rows, strict=True):
        query, parts = statement(text), (table["columns"], table["name"])
        form, right = sql.parse(query, *parts), sql.parse(reference, *parts)
        forms.append(form is not None and right is not None and _form(form) == _form(right))
        results.append(tables.execute(table, query) == tables.execute(table, reference))
    return _accuracies(forms, results)


def statement(answer: str) -> str:
    """Returns the first query in a model's answer, which may be in a block of code; the answer if there is none.

    Example:
      >>> statement("The query is:\\n```sql\\nSELECT city\\nFROM cities;\\n```")
      'SELECT city FROM cities'
    """
    match = _STATEMENT.search(answer)
    return " ".join((match[0] if match else answer).split())


def execute(database: sqlite3.Connection, table: str, query: sql.Query) -> list[Any]:
    """Returns the values that a query selects from a table of a WikiSQL database.

    The texts in these databases are in lower case, and columns have numbers instead of names. A text that is compared
    with a column of numbers stands for the number in it.

    Raises:
      sqlite3.Error: The table or a column does not exist, or SQLite rejects the query.
      ValueError: A text that is compared with a column of numbers has none.
    """
    name = f"table_{table.replace('-', '_')}"
    types = {column: kind.lower() for _, column, kind, *_ in database.execute(f'PRAGMA table_info("{name}")')}
    aggregate, conditions, values = sql.AGGREGATES[query.aggregate], [], []
    for column, operator, content in query.conditions:
        conditions.append(f"col{column} {sql.OPERATORS[operator]} ?")
        is_number = types.get(f"col{column}") == "real"
        values.append(_to_number(content) if is_number else content.lower() if isinstance(content, str) else content)
    selected = f"{aggregate}(col{query.select})" if aggregate else f"col{query.select}"
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return [row[0] for row in database.execute(f'SELECT {selected} FROM "{name}"{where}', values)]


def _open(path: Any) -> contextlib.closing[sqlite3.Connection]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; the accuracy of results needs WikiSQL's databases next to its tables")
    return contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True))


def _result(database: sqlite3.Connection, table: str, query: sql.Query) -> list[Any] | None:
    try:
        return execute(database, table, query)
    except (sqlite3.Error, ValueError):
        return None


def _accuracies(forms: Sequence[bool], results: Sequence[bool]) -> dict[str, float]:
    return {"logical_form": 100 * sum(forms) / len(forms), "execution": 100 * sum(results) / len(results)}


def _form(query: sql.Query) -> tuple[int, int, frozenset]:
    """Returns what is compared of a query: neither the order of its conditions nor the case of its texts."""
    conditions = (
        (column, operator, content.lower() if isinstance(content, str) else content)
        for column, operator, content in query.conditions
    )
    return query.select, query.aggregate, frozenset(conditions)


def _as_texts(query: sql.Query) -> sql.Query:
    """Returns a query with numbers as texts: WikiSQL stores some as texts."""
    conditions = tuple((column, operator, str(content)) for column, operator, content in query.conditions)
    return dataclasses.replace(query, conditions=conditions)


def _to_number(content: str | float) -> float:
    if not isinstance(content, str):
        return content
    try:
        return float(content.replace(",", ""))
    except ValueError:
        numbers = _NUMBER.findall(content)
        if not numbers:
            raise ValueError(f"{content!r} has no number") from None
        return float(numbers[0])
