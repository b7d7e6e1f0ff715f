"""Commonsense reasoning as in LLM-Adapters: 170 thousand questions of eight tasks for training, and their test sets.

The answer is a word such as `true`, `solution2` or `ending4`.

References:
  Hu et al., `LLM-Adapters <https://arxiv.org/abs/2304.01933>`_, 2023
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.input.forms import parse
from experiments.input.official.layout import Example, Layout, Rows, head, json_rows, value

TASKS = (
    *("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande"),
    *("ARC-Easy", "ARC-Challenge", "openbookqa"),
)
_TRAIN = "commonsense_170k.json"


@dataclass(frozen=True)
class Choice:
    """A right answer.

    Attributes:
      label: The word that stands for it.
      task: The task of a test question; empty in training.
    """

    label: str
    task: str = ""


def _rows(paths: Sequence[Path], split: str) -> Rows:
    """Adds the name of the task, which is that of a file's directory, to test questions."""
    if split != "test":
        return json_rows(paths, split)
    rows = [(where, row, path.parent.name) for path in paths for where, row in json_rows([path], split)]
    return [(where, {**row, "task": task} if isinstance(row, dict) else row) for where, row, task in rows]


def _example(row: Any, where: str) -> Example:
    label = value(row, "answer", str, where)
    return Example(parse(row, where, "alpaca")[1], Choice(label, row.get("task", "")))


def _test(tasks: Sequence[str]) -> list[list[str]]:
    return [[f"{folder}{task}/test.json" for task in tasks] for folder in ("dataset/", "")]


def _matches(task: str) -> Callable[[Path], bool]:
    return lambda path: path.parent.name == task and '"instruction"' in head(path)


LAYOUTS = [
    Layout(
        "commonsense",
        {"train": [[_TRAIN], [f"ft-training_set/{_TRAIN}"]], "test": _test(TASKS)},
        _example,
        _rows,
    ),
    *(
        Layout(
            f"commonsense/{task.lower()}",
            {"train": [["train.json"]], "test": [["test.json"]]},
            _example,
            _rows,
            _matches(task),
            (f"dataset/{task}", task),
        )
        for task in TASKS
    ),
]
