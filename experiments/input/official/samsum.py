"""SAMSum: conversations between friends, and summaries of them.

References:
  Gliwa et al., `SAMSum Corpus <https://arxiv.org/abs/1911.12237>`_, 2019
"""

from pathlib import Path
from typing import Any

from experiments.input.columns import check_not_empty
from experiments.input.official.layout import Example, Layout, head, value
from experiments.input.records import Completion


def _example(row: Any, where: str) -> Example:
    dialogue, summary = (value(row, name, str, where) for name in ("dialogue", "summary"))
    check_not_empty(summary, "summary", where)
    dialogue = dialogue.replace("\r\n", "\n").strip()
    return Example(Completion(f"{dialogue}\nsummary:", f" {summary.strip()}"), (summary.strip(),))


def _matches(path: Path) -> bool:
    return all(f'"{name}"' in head(path) for name in ("dialogue", "summary"))


LAYOUT = Layout(
    "samsum",
    {"train": [["train.json"]], "validation": [["val.json"]], "test": [["test.json"]]},
    _example,
    matches=_matches,
    hub="knkarthick/samsum",
)
