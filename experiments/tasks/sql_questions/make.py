"""Generates this directory's data: `python -m experiments.tasks.sql_questions.make`. It yields the same lines again."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.tasks.sql_questions import topics
from experiments.tasks.sql_questions.tables import Table, execute
from experiments.tasks.sql_questions.topics import Topic

SYSTEM = "Translate the question into one SQL query on the table."
SPLITS = {"train": topics.TRAIN, "validation": topics.VALIDATION, "test": topics.TEST}
"""The topics of each split, which differ."""

SIZES = {"train": 2000, "validation": 200, "test": 400}
"""Number of examples of each split."""

_ROWS = 6
_COLUMNS = 4
_PLAIN = (
    "What is the {column} of the {one}{where}?",
    "Show the {column} of every {one}{where}.",
    "Which {column} do the {several}{where} have?",
    "List the {column} of all {several}{where}.",
    "Give me the {column} for each {one}{where}.",
)
_AGGREGATES = {
    "COUNT": ("How many {several}{where} are there?", "Count the {several}{where}.", "Number of {several}{where}?"),
    "MAX": ("What is the highest {column} of the {several}{where}?", "Find the maximum {column} of {several}{where}."),
    "MIN": ("What is the lowest {column} of the {several}{where}?", "Find the minimum {column} of {several}{where}."),
    "AVG": ("What is the average {column} of the {several}{where}?", "Mean {column} of all {several}{where}?"),
    "SUM": ("What is the total {column} of the {several}{where}?", "Add up the {column} of all {several}{where}."),
}
_CONDITIONS = {
    "=": ("{column} {value}", "a {column} of {value}", "{column} equal to {value}"),
    ">": ("{column} above {value}", "a {column} over {value}", "{column} greater than {value}"),
    "<": ("{column} below {value}", "a {column} under {value}", "{column} less than {value}"),
}


def examples(split: str) -> list[dict[str, Any]]:
    """Returns the examples of a split: messages and the table."""
    rng = np.random.default_rng([7, *split.encode()])
    names = list(SPLITS[split])
    rows: dict[str, dict[str, Any]] = {}  # by prompt
    while len(rows) < SIZES[split]:
        name = names[rng.integers(len(names))]
        row = _example(SPLITS[split][name], name, rng)
        rows.setdefault(row["messages"][1]["content"], row)
    return list(rows.values())


def _example(topic: Topic, name: str, rng: np.random.Generator) -> dict[str, Any]:
    others = [column for column in topic.columns if column != topic.key]
    columns = [topic.key, *(str(column) for column in rng.permutation(others)[: _COLUMNS - 1])]
    values = [_values(topic.columns[column], distinct=column == topic.key, rng=rng) for column in columns]
    table = {"name": name, "columns": columns, "rows": [list(row) for row in zip(*values)]}
    question, query = _question(topic, table, rng)
    kinds = (f"{column} {'number' if isinstance(topic.columns[column], range) else 'text'}" for column in columns)
    contents = {
        "system": SYSTEM,
        "user": f"Table {name}: {', '.join(kinds)}\n{question}",
        "assistant": query,
    }
    assert execute(table, query), "a row is selected"
    return {"messages": [{"role": role, "content": text} for role, text in contents.items()], "table": table}


def _values(values: topics.Values, *, distinct: bool, rng: np.random.Generator) -> list[Any]:
    indices = rng.permutation(len(values))[:_ROWS] if distinct else rng.integers(len(values), size=_ROWS)
    return [values[int(index)] for index in indices]


def _question(topic: Topic, table: Table, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a question and its query, whose conditions hold for at least one row."""
    numbers = [column for column in table["columns"] if isinstance(topic.columns[column], range)]
    aggregate = str(rng.choice(["", "", "COUNT", *(list(_AGGREGATES)[1:] if numbers else [])]))
    choices = numbers if aggregate not in ("", "COUNT") else [topic.key] if aggregate else table["columns"]
    column = str(rng.choice(choices))
    witness = dict(zip(table["columns"], table["rows"][rng.integers(len(table["rows"]))]))
    compared = [name for name in table["columns"] if name != column]
    count = int(rng.choice([0, 1, 1, 2]) if aggregate else rng.choice([1, 1, 2]))
    phrases, conditions = [], []
    for name in map(str, rng.permutation(compared)[:count]):
        operator, value = "=", witness[name]
        if name in numbers:
            operator = str(rng.choice(["=", ">", "<"]))
            value += {"=": 0, ">": -1, "<": 1}[operator] * int(rng.integers(1, 10))
        phrase = str(rng.choice(_CONDITIONS[operator]))
        phrases.append(phrase.format(column=name.replace("_", " "), value=value))
        literal = value if name in numbers else "'{}'".format(value.replace("'", "''"))
        conditions.append(f"{name} {operator} {literal}")
    templates = _AGGREGATES[aggregate] if aggregate else _PLAIN
    where = f" with {' and '.join(phrases)}" if phrases else ""
    words = {"column": column.replace("_", " "), "one": topic.one, "several": topic.several, "where": where}
    selected = f"{aggregate}({column})" if aggregate else column
    query = f"SELECT {selected} FROM {table['name']}" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")
    return str(rng.choice(templates)).format(**words), query


def write(directory: Path, splits: Mapping[str, list[dict[str, Any]]]) -> None:
    """Writes a compressed file for each split."""
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{name}: {len(rows)} examples")


def main() -> None:
    """Writes the data next to this file."""
    write(Path(__file__).parent, {split: examples(split) for split in SPLITS})


if __name__ == "__main__":
    main()
