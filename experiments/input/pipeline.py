"""Batches of records, and an iterator over the rows of a process.

A batch depends only on its step. The state of an iterator is `{"next_index": step}`, the same in every process and for
any number of processes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import grain

from experiments.input.checking import OnBad
from experiments.input.encoding import Encoder
from experiments.input.packing import Packed
from experiments.input.sources import Records
from experiments.input.tokenized import tokenize
from experiments.tasks.batching import Batch

_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Batches(Protocol):
    """Global batches by step, such as `Packed` or `Stream`, of which each process reads its rows.

    Attributes:
      batch_size: Rows per batch.
      steps_per_epoch: Batches per epoch.
    """

    batch_size: int
    steps_per_epoch: int

    def rows(self, step: int, rows: slice, /) -> Batch:
        """Returns rows of the batch of a step."""
        ...

    def examples(self, step: int, /) -> int:
        """Returns the number of examples in the whole batch of a step."""
        ...

    def tokens(self, step: int, /) -> int:
        """Returns the number of tokens, without padding, in the whole batch of a step."""
        ...

    def labels(self, step: int, /) -> int:
        """Returns the number of labels in the whole batch of a step."""
        ...


def batches(
    records: Records,
    encoder: Encoder,
    directory: Path,
    *,
    length: int,
    global_batch: int,
    seed: int | None,
    pack: bool = True,
    on_bad: OnBad = "error",
    report: Callable[[str], None] = lambda line: None,
) -> Packed:
    """Tokenizes records and packs them into global batches of rows, the same in every process.

    Args:
      records: From :func:`experiments.input.sources.splits`.
      encoder: From :func:`experiments.input.encoding.load_encoder`.
      directory: The directory of the tokens, see :func:`experiments.input.tokenized.tokenize`.
      length: The length of a row.
      global_batch: Rows per batch, over all processes.
      seed: Random seed of the order. None keeps the order of the records.
      pack: Whether to put several examples into a row.
      on_bad: Whether to raise an error or to skip records that cannot be encoded.
      report: Called with lines that describe the batches.

    Raises:
      UserError: A record is malformed, tokens cannot be written, or no record has a target.
    """
    data = tokenize(records, encoder, directory, on_bad=on_bad, report=report)
    packed = Packed(data, length=length, batch_size=global_batch, seed=seed, pack=pack)
    describe(packed, len(records), report)
    return packed


def describe(packed: Packed, records: int, report: Callable[[str], None]) -> None:
    """Reports what batches contain.

    Args:
      packed: The batches.
      records: The number of records in them.
      report: Called with each line.
    """
    data, length = packed.data, packed.length
    notes = [f"{packed.num_truncated:,} truncated to {length:,} tokens"] if packed.num_truncated else []
    notes += [f"{packed.num_unused:,} without a target within {length:,} tokens"] if packed.num_unused else []
    origin = f" from {records:,} records" if len(data) != records else ""
    what = ", ".join([f"{len(data):,} examples{origin}", *notes])
    for note, count in data.notes.items():
        report(f"{count:,} of {records:,} records: {note}")
    batches = f"{packed.steps_per_epoch:,} batches of {packed.batch_size:,} rows of {length:,} tokens per epoch"
    report(f"{what}; {batches}, {packed.fill:.1%} filled")


def iterate(source: Batches, steps: int, *, rows: slice = slice(None), start: int = 0) -> grain.DatasetIterator[Batch]:
    """Iterates over batches, which threads assemble ahead of time.

    Args:
      source: The batches.
      steps: The end of the iteration, `epochs * source.steps_per_epoch`.
      rows: The rows of this process, from :func:`experiments.training.mesh.rows`.
      start: The first step, for a run that resumes.

    Returns:
      An iterator. Its `get_state()` is `{"next_index": step}`; `set_state` also accepts the state of a run with another
      number of processes. `close()` ends its threads.

    Example:
      >>> import numpy as np
      >>> class Numbers:
      ...     batch_size, steps_per_epoch = 4, 2
      ...     def rows(self, step, rows):
      ...         return {"tokens": 10 * step + np.arange(4)[rows]}
      >>> batches = iterate(Numbers(), 4, rows=slice(2, 4), start=3)
      >>> [batch["tokens"].tolist() for batch in batches]
      [[32, 33]]
    """
    iterator = iter(grain.MapDataset.source(_Steps(source, steps, rows)).to_iter_dataset(_AHEAD))
    iterator.set_state({"next_index": start})
    return iterator


class _Steps:
    """The rows of a process as a random-access data source for Grain."""

    def __init__(self, source: Batches, steps: int, rows: slice):
        self._source, self._steps, self._rows = source, steps, rows

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        return self._source.rows(index, self._rows)
