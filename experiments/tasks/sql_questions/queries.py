"""The metrics of generated SQL: whether a query has the right form, and whether it has the right result.

References:
  Zhong et al., `Seq2SQL <https://arxiv.org/abs/1709.00103>`_, 2017, §4: logical-form and execution accuracy
"""

import contextlib
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NAME, _VALUE = r'"?(\w+)"?', r"'(?:[^']|'')*'|-?\d+(?:\.\d+)?"
_CONDITION = rf"{_NAME}\s*(=|<|>)\s*({_VALUE})"
_QUERY = re.compile(
    rf"select\s+(?:(count|min|max|sum|avg)\s*\(\s*{_NAME}\s*\)|{_NAME})\s+from\s+{_NAME}"
    rf"(?:\s+where\s+((?:{_CONDITION})(?:\s+and\s+{_CONDITION})*))?",
    re.IGNORECASE,
)
_STATEMENT = re.compile(r"\bselect\b[^;`]*", re.IGNORECASE)
_INSTRUCTIONS = 1_000_000  # of SQLite's virtual machine, after which a query is stopped
_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)

Table = Mapping[str, Any]
"""The `name` of a table, its `columns`, and its `rows`."""


class Form(NamedTuple):
    """The logical form of a query on one table; names and texts are in lower case.

    Attributes:
      column: The selected column.
      aggregate: Its aggregate; empty without one.
      table: The table.
      conditions: Tuples of column, operator and value.
    """

    column: str
    aggregate: str
    table: str
    conditions: frozenset[tuple[str, str, str | float]]


def statement(answer: str) -> str:
    """Returns the first query in a model's answer, which may be in a block of code; the answer if there is none.

    Example:
      >>> statement("The query is:\\n```sql\\nSELECT city\\nFROM cities;\\n```")
      'SELECT city FROM cities'
    """
    match = _STATEMENT.search(answer)
    return " ".join((match[0] if match else answer).split())


def parse(query: str) -> Form | None:
    """Returns the form of a query: a column, at most one aggregate, and comparisons; None if it has another one.

    Example:
      >>> parse("SELECT MAX(area) FROM cities WHERE founded > 1500 AND country = 'Peru'") == parse(
      ...     "select max(area) from cities where country = 'peru' and founded > 1500.0"
      ... )
      True
    """
    match = _QUERY.fullmatch(query.strip().rstrip(";").rstrip())
    if match is None:
        return None
    aggregate, aggregated, plain, table, where = match.groups()[:5]
    conditions = {
        (column.lower(), operator, _value(value)) for column, operator, value in re.findall(_CONDITION, where or "")
    }
    return Form((aggregated or plain).lower(), (aggregate or "").lower(), table.lower(), frozenset(conditions))


def _value(text: str) -> str | float:
    return text[1:-1].replace("''", "'").lower() if text.startswith("'") else float(text)


def execute(table: Table, query: str) -> list[tuple[Any, ...]] | None:
    """Returns the rows that a query selects from a table, sorted; None if it fails, changes something or takes long.

    Example:
      >>> cities = {"name": "cities", "columns": ["city", "area"], "rows": [["Lima", 3], ["Oslo", 5]]}
      >>> execute(cities, "SELECT city FROM cities WHERE area > 4"), execute(cities, "DROP TABLE cities")
      ([('Oslo',)], None)
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        names = ", ".join(f'"{name}"' for name in table["columns"])
        database.execute(f'CREATE TABLE "{table["name"]}" ({names})')
        marks = ", ".join("?" for _ in table["columns"])
        database.executemany(f'INSERT INTO "{table["name"]}" VALUES ({marks})', table["rows"])
        database.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY)
        database.set_progress_handler(lambda: 1, _INSTRUCTIONS)
        try:
            return sorted(database.execute(query).fetchall(), key=repr)
        except (sqlite3.Error, sqlite3.Warning, ValueError):  # a ValueError: a null character
            return None


def accuracies(answers: Sequence[str], references: Sequence[str], tables: Sequence[Table]) -> tuple[float, float]:
    """Returns the accuracies of logical forms and of results, from 0 to 100.

    Args:
      answers: The answers of a model.
      references: The right queries.
      tables: The table of each.
    """
    forms = results = 0
    for answer, reference, table in zip(answers, references, tables, strict=True):
        query = statement(answer)
        forms += parse(query) == parse(reference)
        results += execute(table, query) == execute(table, reference)
    return 100 * forms / len(references), 100 * results / len(references)
