"""Questions on paragraphs in SQuAD's format; those of version 2 may have no answer.

References:
  Rajpurkar et al., `SQuAD <https://arxiv.org/abs/1606.05250>`_, 2016
  Rajpurkar et al., `Know What You Don't Know <https://arxiv.org/abs/1806.03822>`_, 2018
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.input.official.layout import Example, Layout, Rows, json_rows, value
from experiments.input.records import Completion

UNANSWERABLE = "unanswerable"
"""The answer to a question that the paragraph does not answer."""


def _rows(paths: Sequence[Path], split: str) -> Rows:
    """Returns a row for each question of the articles."""
    rows = []
    for at, article in json_rows(paths, "data"):
        for paragraph in value(article, "paragraphs", list, at):
            context = value(paragraph, "context", str, at)
            for question in value(paragraph, "qas", list, at):
                where = f"{at}, question {value(question, 'id', str, at)}"
                texts = [value(answer, "text", str, where) for answer in value(question, "answers", list, where)]
                row = {"context": context, "question": value(question, "question", str, where), "answers": texts}
                rows.append((where, row))
    return rows


def _hub_rows(table: Iterable[tuple[str, Any]]) -> Rows:
    return [(where, {**row, "answers": row.get("answers", {}).get("text", [])}) for where, row in table]


def _example(row: Any, where: str) -> Example:
    texts = tuple(row["answers"])
    prompt = f"{row['context'].strip()}\nquestion: {row['question'].strip()}\nanswer:"
    return Example(Completion(prompt, f" {texts[0] if texts else UNANSWERABLE}"), texts)


def _layout(name: str, version: str, hub: str) -> Layout:
    files = {"train": [[f"train-v{version}.json"]], "validation": [[f"dev-v{version}.json"]]}
    return Layout(name, files, _example, _rows, hub=hub, hub_rows=_hub_rows)


LAYOUTS = [_layout("squad", "1.1", "rajpurkar/squad"), _layout("squad-v2", "2.0", "rajpurkar/squad_v2")]
