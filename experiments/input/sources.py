"""Records by number: those of several sources, weighted, selected and divided."""

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
from experiments.input.resolve import Source, resolve

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)")
_MOST = 10**8  # examples of a weighted source


@dataclass(frozen=True)
class Records:
    """Some records of one or several sources, in an order; only their numbers are in memory.

    Attributes:
      sources: Files or data sets.
      source_of: `int32[n]`: the source of each record.
      number_of: `int64[n]`: its number there.
      notes: For each source what reading it through has told, see :func:`experiments.input.checking.checked`.
    """

    sources: tuple[Source, ...]
    source_of: np.ndarray
    number_of: np.ndarray
    notes: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.number_of)

    def __getitem__(self, index: int) -> Record:
        """The record of a number; a UserError where it is malformed."""
        return self.read(index)[1]

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def read(self, index: int) -> tuple[str, Record]:
        """The format and the record of a number; a UserError where it is malformed."""
        return self.sources[self.source_of[index]].read(int(self.number_of[index]))

    def place(self, index: int) -> str:
        """Where a record is, for errors: the file and the line, row or item."""
        return self.sources[self.source_of[index]].place(int(self.number_of[index]))

    def take(self, indices: np.ndarray) -> "Records":
        """The records of some numbers, in their order."""
        return replace(self, source_of=self.source_of[indices], number_of=self.number_of[indices])

    @property
    def digest(self) -> str:
        """Of what the records hold: other records or another order, another digest."""
        digest = hashlib.sha256("\n".join(source.digest for source in self.sources).encode())
        digest.update(self.source_of.tobytes())
        digest.update(self.number_of.tobytes())
        return digest.hexdigest()


def splits(
    data: str | Sequence[str],
    validation: str | Sequence[str] | None = None,
    form: FormName | None = None,
) -> tuple[Records, Records | None]:
    """Records to train on and to validate with.

    Args:
      data: One or several names, each optionally followed by `:WEIGHT`, how often its records are seen in an epoch:
        `a.jsonl:3` three times, `b.parquet:0.5` a fixed half of them. A name is that of

        - a file (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`; each also `.gz` or `.zst`);
        - a glob of files, all of which are to train on;
        - a directory with train and validation files, see :func:`experiments.input.layout.in_directory`, that
          `datasets` saved, or in the form of :func:`experiments.tasks.examples.load`;
        - a split of a directory, `DIRECTORY:SPLIT`, which has to exist;
        - a data set of the hub: `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`;
        - `debian_sections`, which is shipped.
      validation: Other names; None takes what the data have for it, which may be nothing.
      form: The format of all files; None detects it.

    Raises:
      UserError: One of them is not there, not to be had, or empty.
    """
    names = [data] if isinstance(data, str) else list(data)
    others = [validation] if isinstance(validation, str) else list(validation or ())
    train = joined([_weighted(name, "train", form) for name in names])
    if others:
        return train, joined([_weighted(name, "validation", form) for name in others])
    beside = [source for name in names for source in resolve(_weight(name)[0], "validation", form, beside=True)]
    return train, _all(beside) if beside else None


def shared(train: Records, validation: Records) -> list[str]:
    """A line for each source to validate with whose content is trained on too.

    Args:
      train: From :func:`splits`.
      validation: Likewise.
    """
    lines = []
    for source in validation.sources:
        names = [other.name for other in train.sources if other.digest == source.digest]
        if names:
            same = "is" if source.name in names else f"has the same content as {names[0]}, which is"
            lines.append(f"{source.name} {same} trained on too; its loss does not tell how well the model generalizes")
    return lines


def read(data: str, split: str, form: FormName | None = None) -> Records:
    """The records of a split; a file, or a split that is named with a data set, is one by itself.

    Args:
      data: A name, as for :func:`splits`, without a weight.
      split: `train`, `validation` or `test`.
      form: The format; None detects it.

    Raises:
      UserError: It is not there, not to be had, or empty.
    """
    sources = resolve(data, split, form)
    if not sources:
        raise UserError(f"{data}: no records for {split}")
    return _all(sources)


def joined(parts: Sequence[Records]) -> Records:
    """The records of several, one after the other."""
    sources = tuple(source for part in parts for source in part.sources)
    firsts = np.cumsum([0, *(len(part.sources) for part in parts)])
    source_of = [part.source_of + np.int32(first) for part, first in zip(parts, firsts)]
    return Records(sources, np.concatenate(source_of), np.concatenate([part.number_of for part in parts]))


def first(records: Records, count: int | None) -> Records:
    """The first `count` of records; None keeps all.

    Raises:
      UserError: There are fewer.
    """
    if count is None:
        return records
    if not 0 < count <= len(records):
        names = " and ".join(source.name for source in records.sources)
        raise UserError(f"{names}: {count:,} records asked for, there are {len(records):,}")
    return records.take(np.arange(count))


def split(records: Records, share: float, seed: int) -> tuple[Records, Records]:
    """Divides records at random, the same way for the same records, share and seed.

    All copies of a record that is repeated by its weight go to the same side.

    Args:
      records: At least two different ones.
      share: Of the second part, between 0 and 1; it gets at least one record.
      seed: Of the choice.

    Returns:
      The rest, and the share; both in the order of `records`.

    Raises:
      UserError: One part would be empty.
    """
    keys = np.stack([records.source_of.astype(np.int64), records.number_of], axis=1)
    unique, which = np.unique(keys, axis=0, return_inverse=True)
    count = max(round(share * len(unique)), 1)
    if count >= len(unique):
        raise UserError(f"--validation-share {share}: nothing is left of {len(unique):,} records to train on")
    chosen = np.zeros(len(unique), bool)
    chosen[np.random.default_rng(seed).permutation(len(unique))[:count]] = True
    _, firsts = np.unique(which, return_index=True)
    copies = chosen[which.reshape(-1)]
    return records.take(np.flatnonzero(~copies)), records.take(np.sort(firsts[chosen]))


def _weight(name: str) -> tuple[str, float]:
    """A name without its weight, and that. A file whose own name ends so has none."""
    match = _WEIGHT.fullmatch(name)
    if match is None or Path(name).exists():
        return name, 1.0
    if float(match[2]) == 0:
        raise UserError(f"{name}: a weight of 0 leaves nothing of {match[1]}; expected a positive number")
    return match[1], float(match[2])


def _weighted(data: str, split: str, form: FormName | None) -> Records:
    name, weight = _weight(data)
    records = read(name, split, form)
    if weight != 1 and weight * len(records) > _MOST:
        raise UserError(
            f"{data}: a weight of {weight:g} makes more than {_MOST:,} examples of {len(records):,} records"
        )
    whole, part = divmod(weight, 1)
    every = np.tile(np.arange(len(records)), int(whole))
    some = np.random.default_rng(0).permutation(len(records))[: round(part * len(records))]
    if not len(every) + len(some):
        raise UserError(f"{data}: a weight of {weight} leaves none of {len(records):,} records")
    return records if weight == 1 else records.take(np.concatenate([every, np.sort(some)]).astype(np.int64))


def _all(sources: Sequence[Source]) -> Records:
    with reading(sources[0].name):  # a damaged table may speak of more rows than memory has room for
        lengths = [len(source) for source in sources]
        source_of = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
        return Records(tuple(sources), source_of, np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]))
