"""Labeled texts for encoders: a directory of tables with labels, or one of GLUE's tasks."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.input.official import catalog
from experiments.input.official.glue_tasks import TASKS
from experiments.tasks import examples
from experiments.tasks.batching import NO_LABEL
from experiments.tasks.examples import Examples

_HELD_OUT = 1000  # held-out training examples, unless another number is asked for


def load(data: str, split: str, limit: int | None = None) -> Examples:
    """Reads one split of a data set.

    Args:
      data: A directory in the format of :func:`experiments.tasks.examples.load`, the name of a shipped one
        (`debian_sections`), or a task of GLUE: the directory of its files, `glue/rte:DIRECTORY`, or `glue/rte` on the
        Hugging Face Hub.
      split: `train`, `validation` or `test`.
      limit: Number of examples to keep, from the beginning; None keeps all.

    Raises:
      UserError: Files are missing or malformed, the split has fewer than `limit` examples, or the data has no labels.
    """
    selection = _official(data)
    if selection is None:
        if data not in examples.SHIPPED and not Path(data).is_dir():
            raise UserError(f"{data}: no such data directory{catalog.nearest(data)}")
        return examples.load(data, split, limit)
    task = TASKS.get(selection.layout.name.removeprefix("glue/"))
    if task is None:
        raise UserError(f"{selection}: the texts have no labels; expected a directory with labels.txt, or a GLUE task")
    rows, _ = selection.rows(split)
    texts = [tuple(row[name] for name in task.texts) for _, row in rows]
    secret, dtype = (NO_LABEL, np.int32) if task.names else (np.nan, np.float32)
    labels = [task.index(row[task.label], where) if task.label in row else secret for where, row in rows]
    is_pair = len(task.texts) == 2
    texts = texts if is_pair else [text for (text,) in texts]
    return examples.first(Examples(tuple(texts), np.array(labels, dtype), task.names), limit, f"{selection}, {split}")


def load_splits(
    data: str,
    limits: Mapping[str, int | None],
    report: Callable[[str], None] = lambda line: None,
    *,
    development: bool = False,
) -> dict[str, Examples]:
    """Reads several splits of a data set.

    If the labels of the test examples are secret, the development examples take their place, as in papers, and
    validation examples are held out from training. So nothing is selected on the examples that are reported.

    Args:
      data: See :func:`load`.
      limits: The number of examples of each split; None keeps all.
      report: Called with a line on test examples that others replace.
      development: Whether to do so even if the labels of the test examples are public (MRPC's may be), since papers
        report the development examples.

    Raises:
      UserError: See :func:`load`.
    """
    is_official = "test" in limits and _official(data) is not None
    if not is_official or (not development and load(data, "test").are_labeled):
        return {split: load(data, split, limit) for split, limit in limits.items()}
    splits = {"test": replace(load(data, "validation", limits["test"]), is_development=True)}
    why = "papers report the development examples" if development else "the labels of the test examples are secret"
    line = f"{data}: {why}; the development examples take the place of test examples"
    if len(limits) > 1:
        train = load(data, "train")
        if len(train) < 2:
            raise UserError(f"{data}: one training example, expected more, of which some are held out for validation")
        held_out = _held_out(len(train), limits.get("validation"))
        rest = train.select(np.setdiff1d(np.arange(len(train)), held_out))
        where = f"{data}, train without {len(held_out):,} held-out examples"
        splits["train"] = examples.first(rest, limits.get("train"), where)
        splits["validation"] = train.select(held_out)
        line += f", and {len(held_out):,} of the {len(train):,} training examples, chosen at random, are for validation"
    report(line)
    return {split: splits[split] for split in limits}


def _official(data: str) -> catalog.Selection | None:
    """Returns the official data set that a name means; None if it means a directory with public labels."""
    return None if data in examples.SHIPPED else catalog.find(data)


def _held_out(count: int, limit: int | None) -> np.ndarray:
    """Returns the ascending indices of held-out training examples: at most a tenth of all, the same for every seed."""
    size = max(1, min(count // 10, _HELD_OUT if limit is None else limit))
    return np.sort(np.random.default_rng(0).permutation(count)[:size])
