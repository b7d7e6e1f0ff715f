"""SQL queries on one table, as text and in WikiSQL's logical form.

Names of columns and texts are written in quotes, so that the text can be parsed without knowing where a name ends.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")


@dataclass(frozen=True)
class Query:
    """A query in WikiSQL's logical form.

    Attributes:
      select: The index of the selected column.
      aggregate: The index of the aggregate in `AGGREGATES`.
      conditions: The column, the operator's index in `OPERATORS`, and the value of each condition.
    """

    select: int
    aggregate: int
    conditions: tuple[tuple[int, int, str | float], ...]


def column_names(header: Sequence[str]) -> tuple[str, ...]:
    """Returns different names of columns; the second one of a name has a number.

    Example:
      >>> column_names(["Year", "Team", "year", ""])
      ('Year', 'Team', 'year (2)', 'column 4')
    """
    names: list[str] = []
    for number, name in enumerate(header, start=1):
        name = " ".join(name.split()) or f"column {number}"
        same = sum(name.casefold() == other.casefold() for other in header[: number - 1])
        names.append(f"{name} ({same + 1})" if same else name)
    return tuple(names)


def write(query: Query, columns: Sequence[str]) -> str:
    """Returns a query as SQL.

    Example:
      >>> write(Query(1, 3, ((0, 0, "O'Neal"), (2, 1, 3.5))), ("Player", "Team", "Points"))
      'SELECT COUNT("Team") FROM table WHERE "Player" = \\'O\\'\\'Neal\\' AND "Points" > 3.5'
    """
    names = ['"' + name.replace('"', '""') + '"' for name in columns]
    selected = names[query.select]
    selected = f"{AGGREGATES[query.aggregate]}({selected})" if query.aggregate else selected
    conditions = [
        f"{names[column]} {OPERATORS[operator]} {_literal(content)}" for column, operator, content in query.conditions
    ]
    return f"SELECT {selected} FROM table" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")


_NAME, _TEXT, _NUMBER = r'("(?:[^"]|"")*"|\w+)', r"'((?:[^']|'')*)'", r"([-+]?[\d.]+(?:e[-+]?\d+)?)"
_SELECT = re.compile(rf"\s*SELECT\s+(?:(MAX|MIN|COUNT|SUM|AVG)\s*\(\s*{_NAME}\s*\)|{_NAME})\s+FROM\s+{_NAME}", re.I)
_CONDITION = re.compile(rf"\s+(WHERE|AND)\s+{_NAME}\s*([=<>])\s*(?:{_TEXT}|{_NUMBER})", re.I)


def parse(text: str, columns: Sequence[str], table: str = "table") -> Query | None:
    """Returns the logical form of SQL as :func:`write` writes it; None if it is something else.

    Args:
      text: The SQL. A name of letters, digits and underscores needs no quotes, and the case of names does not matter.
      columns: The names of the columns.
      table: The name of the table.

    Example:
      >>> parse('select "Team" from table where Points > 3', ("Player", "Team", "Points"))
      Query(select=1, aggregate=0, conditions=((2, 1, 3),))
    """
    number_of = {name.casefold(): number for number, name in enumerate(columns)}
    start = _SELECT.match(text)
    if start is None or _name(start[4]) != table.casefold():
        return None
    names, conditions, end = [start[2] if start[1] else start[3]], [], start.end()
    while match := _CONDITION.match(text, end):
        if (match[1].upper() == "WHERE") != (not conditions):
            return None
        names.append(match[2])
        try:
            content = match[4].replace("''", "'") if match[5] is None else json.loads(match[5])
        except json.JSONDecodeError:
            return None
        conditions.append((OPERATORS.index(match[3]), content))
        end = match.end()
    indices = [number_of.get(_name(name), -1) for name in names]
    if text[end:].strip(" \n;") or -1 in indices:
        return None
    aggregate = AGGREGATES.index((start[1] or "").upper())
    return Query(indices[0], aggregate, tuple((i, *condition) for i, condition in zip(indices[1:], conditions)))


def _name(text: str) -> str:
    return (text[1:-1].replace('""', '"') if text.startswith('"') else text).casefold()


def _literal(content: str | float) -> str:
    return "'" + content.replace("'", "''") + "'" if isinstance(content, str) else json.dumps(content)
