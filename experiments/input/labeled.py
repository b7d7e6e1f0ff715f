"""Labeled texts for encoders: a directory of tables with labels, or one of GLUE's tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.input.official import catalog
from experiments.input.official.glue_tasks import TASKS
from experiments.tasks import examples
from experiments.tasks.batching import NO_LABEL
from experiments.tasks.examples import Examples


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
    selection = None if data in examples.SHIPPED else catalog.find(data)
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
    data: str, limits: Mapping[str, int | None], report: Callable[[str], None] = lambda line: None
) -> dict[str, Examples]:
    """Reads several splits of a data set.

    The validation examples take the place of test examples whose labels are secret, as in papers.

    Args:
      data: See :func:`load`.
      limits: The number of examples of each split; None keeps all.
      report: Called with a line on test examples whose labels are secret.

    Raises:
      UserError: See :func:`load`.
    """
    splits = {split: load(data, split, limit) for split, limit in limits.items()}
    if "test" in splits and not splits["test"].are_labeled:
        report(f"{data}: the labels of the test examples are secret; the validation examples take their place")
        splits["test"] = splits.get("validation") or load(data, "validation", limits["test"])
    return splits
