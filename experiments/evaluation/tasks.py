"""The metrics of the official data sets by the names of these (:mod:`experiments.input.official.catalog`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.errors import UserError
from experiments.evaluation import choices, labels, queries, reading, texts, wordnet
from experiments.input.official.commonsense import LAYOUTS as COMMONSENSE
from experiments.input.official.glue_tasks import TASKS as GLUE

Metric = Callable[[Any, Any], float]


def _e2e_bleu(answers: Sequence[str], references: texts.References) -> float:
    return texts.bleu(answers, references, lowercase=True)


def _rouge_l(answers: Sequence[str], references: texts.References) -> float:
    return texts.rouge(answers, references, ["rougeL"])["rougeL"]


def _samsum_rouge(kind: str) -> Metric:
    return lambda answers, references: texts.rouge(answers, references, [kind], stemmer=True)[kind]


_LABELS: dict[str, tuple[Metric, ...]] = {
    "cola": (labels.matthews,),
    "mrpc": (labels.accuracy, labels.f1),
    "qqp": (labels.accuracy, labels.f1),
    "stsb": (labels.pearson, labels.spearman),
}
_TEXTS: dict[str, Mapping[str, Metric]] = {
    "e2e": {
        "bleu": _e2e_bleu,
        "nist": texts.nist,
        "rouge_l": _rouge_l,
        "chrf": texts.chrf,
        "ter": texts.ter,
        "meteor": texts.meteor,
    },
    "samsum": {f"rouge_{kind.lower()}": _samsum_rouge(f"rouge{kind}") for kind in ("1", "2", "L")},
}
_OPTIONAL: dict[str, Callable[[], bool]] = {"meteor": wordnet.is_installed}
"""Metrics that need files which no Python package has, and whether these are installed."""
_WHOLE: dict[str, Callable[[Sequence[str], Sequence[Any]], dict[str, float]]] = {
    "squad": reading.score,
    "squad-v2": reading.score,
    "wikisql": queries.score,
    **{layout.name: choices.score for layout in COMMONSENSE},
}


def names(task: str) -> tuple[str, ...]:
    """Returns the names of a task's metrics that have a function each; the others of `TASKS` are computed together."""
    if task.startswith("glue/"):
        return tuple(metric.__name__ for metric in _LABELS.get(task.removeprefix("glue/"), (labels.accuracy,)))
    return tuple(_TEXTS.get(task, ()))


TASKS = (*(f"glue/{name}" for name in GLUE), *_TEXTS, *_WHOLE)
"""The data sets that have metrics."""


def evaluate(
    task: str, predictions: Sequence[Any], answers: Sequence[Any], metrics: Sequence[str] | None = None
) -> dict[str, float]:
    """Returns the metrics of a task, from 0 to 100 as in papers; NIST is not bounded.

    Args:
      task: The name of the data set, such as `e2e` or `glue/cola`.
      predictions: The generated texts; for GLUE also the indices of labels, or numbers.
      answers: What they are compared with: `Example.answer` of each example, for GLUE also the array of labels.
      metrics: Those of :func:`names` to compute. None computes all, METEOR only if WordNet is installed.

    Raises:
      UserError: The task or a metric does not exist, the numbers of predictions and answers differ, or a file that the
        metric needs is missing.

    Example:
      >>> evaluate("glue/mrpc", [1, 1, 0, 1], [1, 0, 0, 1])
      {'accuracy': 75.0, 'f1': 80.0}
      >>> evaluate("squad", ["the Louvre", "in 1889"], [("Louvre",), ("1889", "May 1889")])["exact_match"]
      50.0
    """
    if task not in TASKS:
        raise UserError(f"{task}: no metrics; expected one of {', '.join(TASKS)}")
    if len(predictions) != len(answers) or not len(answers):
        raise UserError(f"{task}: {len(predictions)} predictions for {len(answers)} answers; expected one for each")
    if task in _WHOLE:
        return _WHOLE[task](predictions, answers)
    available = names(task)
    if unknown := [name for name in metrics or () if name not in available]:
        raise UserError(f"{task}: no metric {unknown[0]}; expected {', '.join(available)} (CIDEr is not implemented)")
    default = [name for name in available if name not in _OPTIONAL or _OPTIONAL[name]()]
    chosen = [name for name in available if name in metrics] if metrics else default
    if task in _TEXTS:
        return {name: _TEXTS[task][name](predictions, answers) for name in chosen}
    truth = np.asarray(answers)
    is_text, names_of_labels = isinstance(predictions[0], str), GLUE[task.removeprefix("glue/")].names
    numbers = labels.read_answers(predictions, truth, names_of_labels) if is_text else np.asarray(predictions)
    return {name: getattr(labels, name)(numbers, truth) for name in chosen}


def table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns the metrics of a task with a line for each model.

    Args:
      scores: The metrics of each model, from :func:`evaluate`.
    """
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("")
    for name in next(iter(scores.values())):
        rows.add_column(name, justify="right", no_wrap=True)
    for name, metrics in scores.items():
        rows.add_row(name, *(f"{metric:.1f}" for metric in metrics.values()))
    return rows
