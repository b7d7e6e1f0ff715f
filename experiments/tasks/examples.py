"""Reads labeled texts from a directory with `labels.txt` and a table for each split."""

import gzip
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError

SHIPPED = {
    name: Path(__file__).parent / name
    for name in (
        *("debian_synopses", "debian_sections", "debian_siblings", "debian_topics"),
        *("debian_tags", "sql_questions"),
    )
}


@dataclass(frozen=True)
class Examples:
    """Labeled texts, or labeled pairs of texts.

    Attributes:
      texts: The text of each example, or the tuple of its two texts.
      labels: `int32[examples]`, indices in `names`, `NO_LABEL` where the data set keeps the label secret; of a
        regression `float32[examples]`, NaN where it is secret.
      names: The names of the labels, in the order of a model's outputs; of a regression none.
      is_development: Whether they are development examples in the place of test examples whose labels are secret.
    """

    texts: tuple[Any, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    is_development: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def are_pairs(self) -> bool:
        """Whether each example has two texts."""
        return isinstance(self.texts[0], tuple)

    @property
    def are_labeled(self) -> bool:
        """Whether the labels are public."""
        return bool(np.all(self.labels >= 0))

    def select(self, indices: np.ndarray) -> "Examples":
        """Returns some of the examples."""
        return replace(self, texts=tuple(self.texts[index] for index in indices), labels=self.labels[indices])


def limits(config: Any) -> dict[str, int | None]:
    """Returns a config's number of examples of each split (`train_examples` and so on)."""
    return {split: getattr(config, f"{split}_examples") for split in ("train", "validation", "test")}


def load(directory: str | Path, split: str, limit: int | None = None) -> Examples:
    """Reads one split of a data set.

    The directory contains `labels.txt` with one label per line, and for each split `SPLIT.tsv` or `SPLIT.tsv.gz` with a
    header and one example per line. The first column is the label and the last one the text; others are ignored.

    Args:
      directory: A directory, or the name of a shipped one with labels: `debian_sections`.
      split: `train`, `validation` or `test`.
      limit: Number of examples to keep, from the beginning; None keeps all.

    Raises:
      UserError: A file is missing or empty, a line is malformed, a label is not in `labels.txt`, or the split has fewer
        than `limit` examples.
    """
    directory = SHIPPED.get(str(directory), Path(directory))
    if not directory.is_dir():
        raise UserError(f"{directory}: no such data directory")
    names = _labels(directory / "labels.txt")
    index_of = {name: index for index, name in enumerate(names)}
    path = next((p for p in (directory / f"{split}.tsv", directory / f"{split}.tsv.gz") if p.exists()), None)
    if path is None:
        raise UserError(f"{directory}: no {split}.tsv or {split}.tsv.gz in this data directory")
    header, *rows = read_lines(path) or [""]
    width = header.count("\t") + 1
    if not rows:
        raise UserError(f"{path}: the file is empty" + (" except for its header" if header else ""))
    if width < 2:
        raise UserError(f"{path}, line 1: the header must name at least two columns separated by tabs")
    texts, labels = [], []
    for number, row in enumerate(rows, start=2):
        fields = row.split("\t")
        if len(fields) != width or not fields[-1].strip():
            raise UserError(f"{path}, line {number}: expected {width} tab-separated columns and a text in the last one")
        if fields[0] not in index_of:
            raise UserError(f"{path}, line {number}: label {fields[0]!r} is not in {directory / 'labels.txt'}")
        texts.append(fields[-1])
        labels.append(index_of[fields[0]])
    return first(Examples(tuple(texts), np.array(labels, np.int32), names), limit, str(path))


def first(examples: Examples, limit: int | None, where: str) -> Examples:
    """Returns the first `limit` examples; None keeps all.

    Raises:
      UserError: There are fewer examples.
    """
    if limit is None:
        return examples
    if not 0 < limit <= len(examples):
        raise UserError(f"{where}: expected at least {limit} examples, got {len(examples)}; None uses all")
    return replace(examples, texts=examples.texts[:limit], labels=examples.labels[:limit])


def _labels(path: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in read_lines(path) if line.strip())
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError(f"{path}: expected at least two different labels, one per line")
    return names


def read_lines(path: Path) -> list[str]:
    """Reads the lines of a plain or compressed text file, without a byte order mark.

    Raises:
      UserError: The file is missing or damaged, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text.strip() else []
