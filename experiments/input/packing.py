"""Packs several examples into each row of a batch. A batch is a function of its step only.

Grain's packers work on a stream, so the content of a batch depends on everything earlier in the stream of its process,
and therefore on the number of processes. Here the lengths of all examples are available before the first step: all rows
are planned once, and any process can assemble any rows of any batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from experiments.errors import UserError
from experiments.input.tokenized import Tokenized
from experiments.tasks.batching import NO_LABEL, Batch


@dataclass(frozen=True)
class Rows:
    """The assignment of examples to rows.

    Attributes:
      members: `int64[examples]`, the indices of the examples, row by row.
      starts: `int64[rows + 1]`, the index in `members` at which each row begins.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


LONGEST = 2048
"""The largest length that :func:`fit_length` chooses."""


def fit_length(data: Iterable[Tokenized], longest: int | None = None, multiple: int = 128) -> int:
    """Returns the smallest length of a row that truncates no example, or the largest possible one.

    Args:
      data: Tokenized examples.
      longest: The longest sequence that the model supports; None if unknown.
      multiple: The length is a multiple of it, unless `longest` is smaller.

    Example:
      >>> data = Tokenized(*[np.zeros(0)] * 2, lengths=np.array([40, 150]), firsts=None, owners=None, digest="")
      >>> fit_length([data]), fit_length([data], longest=100)
      (256, 100)
    """
    return min(-(-positions(data) // multiple) * multiple, longest or LONGEST, LONGEST)


def positions(data: Iterable[Tokenized]) -> int:
    """Returns the number of positions that the longest example takes: one less than its tokens."""
    return max((int(part.lengths.max(initial=2)) for part in data), default=2) - 1


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Assigns each size, in order, to the row with the least sufficient space, or to a new row.

    Args:
      sizes: Integers from 1 to `length`.
      length: The length of a row.

    Returns:
      `int64[len(sizes)]`, the row of each size.

    Example:
      >>> best_fit(np.array([3, 2, 1, 2]), 4).tolist()
      [0, 1, 0, 1]
    """
    rows = np.empty(len(sizes), np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(length + 1)]
    spaces = 0  # bit s is set if a row has space s; the least sufficient one takes no search
    count = 0
    for i, size in enumerate(sizes.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row, count = length, count, count + 1
        rows[i] = row
        if space > size:
            rows_by_space[space - size].append(row)
            spaces |= 1 << (space - size)
    return rows


class Packed:
    """Batches of packed examples: `packed[step]` is the batch of a step, and `packed.rows` a part of it.

    A batch is a dict of `int32[batch_size, length]` arrays: `tokens`; `segments`, 1, 2, … for the examples of a row and
    0 at padding; `positions`, from 0 in each segment; `labels`, the next token at each position, or `NO_LABEL` if the
    loss does not cover it. An epoch contains every example once, except those without a target within the length.
    The last batch of an epoch is padded with empty rows. All epochs have the same rows in different orders.

    Args:
      data: The tokenized examples.
      length: The length of a row. An example of n tokens takes n - 1 positions; longer examples are truncated.
      batch_size: Rows per batch.
      seed: Random seed of the orders. None keeps the order of the examples.
      pack: Whether to put several examples into a row.

    Attributes:
      data: The tokenized examples.
      steps_per_epoch: Batches per epoch.
      batch_size: Rows per batch.
      length: The length of a row.
      truncated: `bool[examples]`, whether an example is truncated.
      unused: `bool[examples]`, whether an example has no target within the length.
      num_truncated: Number of truncated examples.
      num_unused: Number of unused examples.
      max_labels: The largest number of labels in a row.

    Raises:
      UserError: No example has a target within the length.
    """

    unused_reason = "without a target within"

    def __init__(self, data: Tokenized, *, length: int, batch_size: int, seed: int | None, pack: bool = True):
        self.data, self.length, self.batch_size, self._seed = data, length, batch_size, seed
        self._begins = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
        self._sizes = np.minimum(data.lengths - 1, length)
        self.unused = (data.firsts >= data.lengths) | (data.firsts > length)
        self.truncated = ~self.unused & (data.lengths - 1 > length)
        (order,) = np.nonzero(~self.unused)
        if not len(order):
            raise UserError(
                f"none of {len(data):,} examples has a target within {length} tokens; use a larger length, or check "
                "that the records have answers"
            )
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        row = best_fit(self._sizes[order], length) if pack else np.arange(len(order))
        starts = np.searchsorted(np.sort(row), np.arange(row.max() + 2))
        self._rows = Rows(order[np.argsort(row, kind="stable")], starts)
        self.steps_per_epoch = -(-len(self._rows) // batch_size)
        self.num_truncated, self.num_unused = int(self.truncated.sum()), int(self.unused.sum())
        self._labels = self._count_labels()
        self.max_labels = int(self._row_sums(self._labels).max())
        self._order = lru_cache(maxsize=2)(self._permutation)  # threads that read ahead may be in two epochs

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns rows of the batch `packed[step]`."""
        numbers = self._numbers(step, rows)
        counts = np.where(numbers < 0, 0, self._rows.starts[numbers + 1] - self._rows.starts[numbers])
        index_in_row = _ranges(counts)
        examples = self._rows.members[np.repeat(self._rows.starts[numbers], counts) + index_in_row]
        sizes = self._sizes[examples]
        # The offset of each example in its row: the sizes of the examples before it.
        ends = np.concatenate([[0], np.cumsum(sizes)])
        firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        offsets = ends[:-1] - np.repeat(ends[firsts], counts)
        positions = _ranges(sizes)
        sources = np.repeat(self._begins[examples], sizes) + positions
        targets = np.repeat(np.repeat(np.arange(len(numbers)) * self.length, counts) + offsets, sizes) + positions
        tokens, learned = self.data.tokens, self.data.targets[sources + 1]
        values = {
            "tokens": tokens[sources],
            "segments": np.repeat(index_in_row + 1, sizes),
            "positions": positions,
            "labels": np.where(learned, tokens[sources + 1].astype(np.int32), NO_LABEL),
        }
        batch = {}
        for name, value in values.items():
            empty = NO_LABEL if name == "labels" else 0
            batch[name] = np.full((len(numbers), self.length), empty, np.int32)
            batch[name].reshape(-1)[targets] = value
        return batch

    def examples(self, step: int) -> int:
        """Returns the number of examples in the batch of a step."""
        numbers = self._numbers(step, slice(None))
        return int(np.diff(self._rows.starts)[numbers[numbers >= 0]].sum())

    def tokens(self, step: int) -> int:
        """Returns the number of tokens, without padding, in the batch of a step."""
        return self._sum(self._sizes, step)

    def labels(self, step: int) -> int:
        """Returns the number of labels in the batch of a step."""
        return self._sum(self._labels, step)

    def _sum(self, values: np.ndarray, step: int) -> int:
        numbers = self._numbers(step, slice(None))
        return int(self._row_sums(values)[numbers[numbers >= 0]].sum())

    def _row_sums(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum of a value of each example in each row."""
        return np.add.reduceat(values[self._rows.members], self._rows.starts[:-1], dtype=np.int64)

    def _count_labels(self) -> np.ndarray:
        """Returns the number of labels of each example; an example's first token is no label."""
        counts = np.zeros(len(self.data), np.int64)
        (full,) = np.nonzero(self.data.lengths)
        targets, begins = self.data.targets[: self.data.lengths.sum()], self._begins[full]
        if len(full):
            counts[full] = np.add.reduceat(targets.view(np.uint8), begins, dtype=np.int64) - targets[begins]
        for number in np.flatnonzero(self.truncated):
            begin = self._begins[number] + 1
            counts[number] = np.count_nonzero(targets[begin : begin + self._sizes[number]])
        return counts

    @property
    def fill(self) -> float:
        """The fraction of an epoch's positions that are not padding."""
        return float(self._sizes[self._rows.members].sum() / (len(self._rows) * self.length))

    def _numbers(self, step: int, rows: slice) -> np.ndarray:
        """Returns the indices of the rows of a batch; -1 for an empty row."""
        epoch, index = divmod(step, self.steps_per_epoch)
        numbers = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)[rows]

    def _permutation(self, epoch: int) -> np.ndarray:
        count = len(self._rows)
        return np.arange(count) if self._seed is None else np.random.default_rng([self._seed, epoch]).permutation(count)


def _ranges(counts: np.ndarray) -> np.ndarray:
    """Concatenates `arange(count)` for each count."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
