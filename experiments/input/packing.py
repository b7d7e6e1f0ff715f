"""Several examples a row, with their segments, positions and next tokens: a batch as a function of its step alone.

Grain's packers work on a stream: what stands in a batch depends on all that came before it in the stream of its own
process, and so on how many processes there are. Here the lengths of all examples are known before the first step, rows
are planned from them once, and any process can make any rows of any batch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from experiments.errors import UserError
from experiments.input.tokenized import Tokenized
from experiments.tasks.batching import NO_LABEL, Batch


@dataclass(frozen=True)
class Rows:
    """Which examples stand in which row.

    Attributes:
      members: `int64[examples]`, the numbers of the examples, row by row.
      starts: `int64[rows + 1]`: where in `members` a row begins.
    """

    members: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Puts every size, in turn, into the row with the least space that holds it, or into a new one.

    Args:
      sizes: Whole numbers from 1 to `length`.
      length: Of a row.

    Returns:
      `int64[len(sizes)]`, the row of each.

    Example:
      >>> best_fit(np.array([3, 2, 1, 2]), 4).tolist()
      [0, 1, 0, 1]
    """
    rows = np.empty(len(sizes), np.int64)
    waiting: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the space that they have left
    spaces = 0  # bit by bit, whether a row waits with that space: finding the least takes no search
    count = 0
    for i, size in enumerate(sizes.tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = waiting[space].pop()
            if not waiting[space]:
                spaces ^= 1 << space
        else:
            space, row, count = length, count, count + 1
        rows[i] = row
        if space > size:
            waiting[space - size].append(row)
            spaces |= 1 << (space - size)
    return rows


class Packed:
    """Batches of packed examples: `packed[step]` is the batch of that step, and `packed.rows` a part of it.

    A batch is a dict of `int32[batch_size, length]`: `tokens`; `segments`, 1, 2, … for the examples of a row and 0 at
    padding; `positions`, from 0 in each segment; `labels`, the token that each place should predict, `NO_LABEL` where
    that is the prompt's or none. Every example is seen once a pass, those apart that have nothing to learn within the
    length. Rows that the last batch of a pass lacks are empty. Rows stay what they are; every pass has them in
    another order.

    Args:
      data: Tokens.
      length: Of a row. An example of n tokens takes n - 1 places; a longer one is cut at the end.
      batch_size: Rows of a batch.
      seed: Of the orders; None keeps the examples' own.
      pack: False puts one example into a row.

    Attributes:
      data: The tokens.
      steps_per_epoch: How many batches a pass over the data takes.
      batch_size: Rows of a batch.
      truncated: `bool[examples]`: which are cut at the end.
      unused: `bool[examples]`: which have nothing to learn within the length.
      cut: How many examples are cut.
      left_out: How many have nothing to learn within the length.

    Raises:
      UserError: That is all of them.
    """

    def __init__(self, data: Tokenized, *, length: int, batch_size: int, seed: int | None, pack: bool = True):
        self.data, self._length, self.batch_size, self._seed = data, length, batch_size, seed
        self._begins = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
        self._sizes = np.minimum(data.lengths - 1, length)
        self.unused = (data.firsts >= data.lengths) | (data.firsts > length)
        self.truncated = ~self.unused & (data.lengths - 1 > length)
        (order,) = np.nonzero(~self.unused)
        if not len(order):
            raise UserError(
                f"none of {len(data):,} examples has anything to learn within {length} tokens: all prompts?"
            )
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        row = best_fit(self._sizes[order], length) if pack else np.arange(len(order))
        starts = np.searchsorted(np.sort(row), np.arange(row.max() + 2))
        self._rows = Rows(order[np.argsort(row, kind="stable")], starts)
        self.steps_per_epoch = -(-len(self._rows) // batch_size)
        self.cut, self.left_out = int(self.truncated.sum()), int(self.unused.sum())
        self._order = lru_cache(maxsize=2)(self._ordered)  # threads that read ahead may be in two passes at once

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Some rows of the batch of a step, as `packed[step]` has them."""
        numbers = self._numbers(step, rows)
        counts = np.where(numbers < 0, 0, self._rows.starts[numbers + 1] - self._rows.starts[numbers])
        within = _counted(counts)
        examples = self._rows.members[np.repeat(self._rows.starts[numbers], counts) + within]
        sizes = self._sizes[examples]
        # Where each example begins in its row: behind those before it.
        ends = np.concatenate([[0], np.cumsum(sizes)])
        firsts = np.concatenate([[0], np.cumsum(counts)])[:-1]
        offsets = ends[:-1] - np.repeat(ends[firsts], counts)
        positions = _counted(sizes)
        sources = np.repeat(self._begins[examples], sizes) + positions
        places = np.repeat(np.repeat(np.arange(len(numbers)) * self._length, counts) + offsets, sizes) + positions
        tokens, learned = self.data.tokens, self.data.targets[sources + 1]
        values = {
            "tokens": tokens[sources],
            "segments": np.repeat(within + 1, sizes),
            "positions": positions,
            "labels": np.where(learned, tokens[sources + 1].astype(np.int32), NO_LABEL),
        }
        batch = {}
        for name, value in values.items():
            empty = NO_LABEL if name == "labels" else 0
            batch[name] = np.full((len(numbers), self._length), empty, np.int32)
            batch[name].reshape(-1)[places] = value
        return batch

    def examples(self, step: int) -> int:
        """How many examples the batch of a step holds."""
        numbers = self._numbers(step, slice(None))
        return int(np.diff(self._rows.starts)[numbers[numbers >= 0]].sum())

    @property
    def fill(self) -> float:
        """The share of places, over a pass, that hold a token and no padding."""
        return float(self._sizes[self._rows.members].sum() / (len(self._rows) * self._length))

    def _numbers(self, step: int, rows: slice) -> np.ndarray:
        """The numbers of the rows of a batch; -1 where there is none."""
        epoch, index = divmod(step, self.steps_per_epoch)
        found = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return np.pad(found, (0, self.batch_size - len(found)), constant_values=-1)[rows]

    def _ordered(self, epoch: int) -> np.ndarray:
        count = len(self._rows)
        return np.arange(count) if self._seed is None else np.random.default_rng([self._seed, epoch]).permutation(count)


def _counted(counts: np.ndarray) -> np.ndarray:
    """0, 1, … up to each count, one behind the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
