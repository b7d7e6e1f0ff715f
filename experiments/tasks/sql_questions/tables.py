"""Executes queries on the tables of the questions, with SQLite in memory."""

import contextlib
import sqlite3
from collections.abc import Mapping
from typing import Any

_INSTRUCTIONS = 1_000_000  # of SQLite's virtual machine, after which a query is stopped
_ALLOWED = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)

Table = Mapping[str, Any]
"""The `name` of a table, its `columns`, and its `rows`."""


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
