"""Indexed records of several sources, weighted, selected and split."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import UserError, reading
from experiments.input.forms import FormName
from experiments.input.records import Record
from experiments.input.resolve import Official, Source, resolve

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_MAX_WEIGHTED = 10**8  # examples of a weighted source


@dataclass(frozen=True)
class Records:
    """An ordered selection of the records of several sources. Only their indices are in memory.

    Attributes:
      sources: Files or data sets.
      source_of: `int32[n]`, the index of each record's source.
      number_of: `int64[n]`, the index of each record in its source.
    """

    sources: tuple[Source, ...]
    source_of: np.ndarray
    number_of: np.ndarray

    def __len__(self) -> int:
        return len(self.number_of)

    def __getitem__(self, index: int) -> Record:
        """Reads a record; raises a UserError if it is malformed."""
        return self.read(index)[1]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> tuple[str, Record]:
        """Reads the format and the content of a record; raises a UserError if it is malformed."""
        return self.sources[self.source_of[index]].read(int(self.number_of[index]))

    def location(self, index: int) -> str:
        """Returns a record's file and its line, row or item, for error messages."""
        return self.sources[self.source_of[index]].location(int(self.number_of[index]))

    def take(self, indices: np.ndarray) -> "Records":
        """Returns the records at the given indices, in their order."""
        return replace(self, source_of=self.source_of[indices], number_of=self.number_of[indices])

    @property
    def digest(self) -> str:
        """A digest of the records and their order."""
        digest = hashlib.sha256("\n".join(source.digest for source in self.sources).encode())
        digest.update(self.source_of.tobytes())
        digest.update(self.number_of.tobytes())
        return digest.hexdigest()


def splits(
    data: str | Sequence[str],
    validation: str | Sequence[str] | None = None,
    form: FormName | None = None,
) -> tuple[Records, Records | None]:
    """Opens the records for training and validation.

    Args:
      data: One or several names, each optionally followed by `:WEIGHT`, how often its records are used per epoch:
        `a.jsonl:3` uses all records three times, `b.parquet:0.5` a fixed half of them once. A name is

        - a file (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`; each also `.gz` or `.zst`);
        - a glob of training files;
        - a directory with train and validation files, see :func:`experiments.input.layout.in_directory`, saved by
          `datasets`, or in the format of :func:`experiments.tasks.examples.load`;
        - a split of a directory, `DIRECTORY:SPLIT`, which has to exist;
        - a data set on the Hugging Face Hub: `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`;
        - an official data set (:mod:`experiments.input.official.catalog`): the directory of its files,
          `NAME:DIRECTORY`, `NAME:DIRECTORY:SPLIT`, or `NAME` on the Hub;
        - `debian_synopses`, `debian_sections`, `debian_siblings`, `debian_topics`, `debian_tags` or `sql_questions`,
          which are shipped.
      validation: Names of validation data; None uses the validation splits of `data`, if there are any.
      form: The format of all files; None detects it.

    Returns:
      The records for training, and those for validation or None.

    Raises:
      UserError: Data is missing, unavailable or empty.
    """
    names = [data] if isinstance(data, str) else list(data)
    others = [validation] if isinstance(validation, str) else list(validation or ())
    train = concatenate([_read_weighted(name, "train", form) for name in names])
    if others:
        return train, concatenate([_read_weighted(name, "validation", form) for name in others])
    return train, read_separate(names, "validation", form)


def read_separate(data: Sequence[str], split: str, form: FormName | None = None) -> Records | None:
    """Opens the records of a split other than the training data.

    Args:
      data: Names as for :func:`splits`.
      split: `validation` or `test`.
      form: The format; None detects it.

    Returns:
      The records; None if none of the data has the split.

    Raises:
      UserError: The data is missing, unavailable or empty.
    """
    sources = [source for name in data for source in resolve(_split_weight(name)[0], split, form, separate=True)]
    return _all(sources) if sources else None


def official_answers(records: Records) -> tuple[str, list[Any]] | None:
    """Returns what the metrics of an official data set compare answers with.

    Args:
      records: The records.

    Returns:
      The name of the data set, and the answer of each record (:class:`experiments.input.official.layout.Example`); None
      for records of other data or of several data sets.

    Raises:
      UserError: A record is malformed.
    """
    sources = [records.sources[number] for number in records.source_of]
    examples = [
        source.example(int(number))
        for source, number in zip(sources, records.number_of)
        if isinstance(source, Official)
    ]
    names = {source.selection.layout.name for source in sources if isinstance(source, Official)}
    if len(names) != 1 or len(examples) < len(records):
        return None
    return names.pop(), [example.answer for example in examples]


def unweighted(data: Sequence[str]) -> str:
    """Returns the names of data without weights, for the user."""
    return " and ".join(_split_weight(name)[0] for name in data)


def overlap_warnings(train: Records, validation: Records) -> list[str]:
    """Returns a warning for each validation source whose content is also training data.

    Args:
      train: From :func:`splits`.
      validation: From :func:`splits`.
    """
    lines = []
    for source in validation.sources:
        names = [other.name for other in train.sources if other.digest == source.digest]
        if names:
            same = "is" if source.name in names else f"has the same content as {names[0]}, which is"
            lines.append(f"{source.name} {same} also training data; its loss does not measure generalization")
    return lines


def read(data: str, split: str, form: FormName | None = None) -> Records:
    """Opens the records of a split. A single file, or a name with a split, is used for any split.

    Args:
      data: A name as for :func:`splits`, without a weight.
      split: `train`, `validation` or `test`.
      form: The format; None detects it.

    Raises:
      UserError: The data is missing, unavailable or empty.
    """
    sources = resolve(data, split, form)
    if not sources:
        raise UserError(f"{data}: no records for {split}")
    return _all(sources)


def concatenate(parts: Sequence[Records]) -> Records:
    """Concatenates records."""
    sources = tuple(source for part in parts for source in part.sources)
    firsts = np.cumsum([0, *(len(part.sources) for part in parts)])
    source_of = [part.source_of + np.int32(first) for part, first in zip(parts, firsts)]
    return Records(sources, np.concatenate(source_of), np.concatenate([part.number_of for part in parts]))


def first(records: Records, count: int | None) -> Records:
    """Returns the first `count` records; None keeps all.

    Raises:
      UserError: There are fewer records.
    """
    if count is None:
        return records
    if not 0 < count <= len(records):
        names = " and ".join(source.name for source in records.sources)
        raise UserError(f"{names}: expected at least {count:,} records, got {len(records):,}")
    return records.take(np.arange(count))


def split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Splits records at random, deterministically for the same records, share and seed.

    All copies of a record that is repeated by its weight go to the same part.

    Args:
      records: At least two different records.
      share: The fraction of the second part, between 0 and 1; it gets at least one record.
      seed: Random seed.

    Returns:
      The remaining records and the share, both in the order of `records`.

    Raises:
      UserError: One part would be empty.
    """
    keys = np.stack([records.source_of.astype(np.int64), records.number_of], axis=1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    count = max(round(share * len(unique)), 1)
    if count >= len(unique):
        raise UserError(f"--validation-share {share}: no training data remains of {len(unique):,} records")
    chosen = np.zeros(len(unique), bool)
    chosen[np.random.default_rng(seed).permutation(len(unique))[:count]] = True
    _, firsts = np.unique(inverse, return_index=True)
    copies = chosen[inverse.reshape(-1)]
    return records.take(np.flatnonzero(~copies)), records.take(np.sort(firsts[chosen]))


def _split_weight(name: str) -> tuple[str, float]:
    """Splits a weight off a name. If a file with the whole name exists, there is no weight."""
    match = _WEIGHT.fullmatch(name)
    if match is None or Path(name).exists():
        return name, 1.0
    if float(match[2]) == 0:
        raise UserError(f"{name}: a weight of 0 uses nothing of {match[1]}; expected a positive number")
    return match[1], float(match[2])


def _read_weighted(data: str, split: str, form: FormName | None) -> Records:
    name, weight = _split_weight(data)
    records = read(name, split, form)
    if weight != 1 and weight * len(records) > _MAX_WEIGHTED:
        raise UserError(
            f"{data}: a weight of {weight:g} yields more than {_MAX_WEIGHTED:,} examples from {len(records):,} records"
        )
    whole, part = divmod(weight, 1)
    repeated = np.tile(np.arange(len(records)), int(whole))
    remainder = np.random.default_rng(0).permutation(len(records))[: round(part * len(records))]
    if not len(repeated) + len(remainder):
        raise UserError(f"{data}: a weight of {weight} uses none of {len(records):,} records")
    return records if weight == 1 else records.take(np.concatenate([repeated, np.sort(remainder)]).astype(np.int64))


def _all(sources: Sequence[Source]) -> Records:
    with reading(sources[0].name):  # a damaged table may declare more rows than fit into memory
        lengths = [len(source) for source in sources]
        source_of = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
        return Records(tuple(sources), source_of, np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))
