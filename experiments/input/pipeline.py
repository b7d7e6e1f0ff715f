"""From batches by step to an iterator that each process draws its rows of them from.

What is drawn at a step depends on that step and on nothing before it: an iterator's state is `{"next_index": step}`,
the same in every process and for every number of processes.
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
    """Global batches by step, of which any rows can be had: packed ones, or a `Stream`.

    Attributes:
      batch_size: Rows of a batch.
      steps_per_epoch: How many batches a pass over the data takes.
    """

    batch_size: int
    steps_per_epoch: int

    def rows(self, step: int, rows: slice, /) -> Batch:
        """Some rows of the batch of a step."""
        ...

    def examples(self, step: int, /) -> int:
        """How many examples the whole batch of a step holds."""
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
    process_index: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Packed:
    """Global batches of records; every process gets the same ones.

    Args:
      records: From :func:`experiments.input.sources.splits`.
      encoder: From :func:`experiments.input.encoding.load_encoder`.
      directory: Where tokens are kept, see :func:`experiments.input.tokenized.tokenize`.
      length: Of a row.
      global_batch: Rows of a batch, over all processes.
      seed: Of the order; None keeps the records' own.
      pack: False puts one record into a row.
      on_bad: What to do about a record that cannot be encoded: raise an error, or skip it.
      process_index: Of this process among those that share the directory.
      report: Called with a line on what is in them.

    Raises:
      UserError: A record is malformed, tokens cannot be written, or there is nothing to learn.
    """
    data = tokenize(records, encoder, directory, on_bad=on_bad, process_index=process_index, report=report)
    packed = Packed(data, length=length, batch_size=global_batch, seed=seed, pack=pack)
    notes = [f"{packed.cut:,} cut to {length:,} tokens"] if packed.cut else []
    notes += [f"{packed.left_out:,} left out with nothing to learn within that"] if packed.left_out else []
    several = f" of {len(records):,} records" if len(data) != len(records) else ""
    what = ", ".join([f"{len(data):,} examples{several}", *notes])
    for note, count in data.notes.items():
        report(f"{count:,} of {len(records):,} records: {note}")
    report(f"{what}; {packed.steps_per_epoch:,} batches of {global_batch:,} rows a pass, {packed.fill:.1%} full")
    return packed


def iterate(source: Batches, steps: int, *, rows: slice = slice(None), start: int = 0) -> grain.DatasetIterator[Batch]:
    """Batches in turn, made ahead of time by threads.

    Args:
      source: Where they are from.
      steps: Where the iterator ends: `epochs * source.steps_per_epoch`.
      rows: Those of this process, :func:`experiments.training.mesh.rows`.
      start: The first step, of a run that resumes.

    Returns:
      An iterator whose `get_state()` is `{"next_index": step}`, which is plain JSON, and which `set_state` takes, also
      from a run with other processes. `close()` ends its threads.

    Example:
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
    """The rows of a process as what Grain calls a random-access data source."""

    def __init__(self, source: Batches, steps: int, rows: slice):
        self._source, self._steps, self._rows = source, steps, rows

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> Batch:
        return self._source.rows(index, self._rows)
