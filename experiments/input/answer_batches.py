"""Batches of answers with their prompts, one or two rows per record, for the objectives of post-training."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from experiments.errors import UserError
from experiments.input.answers import AnswerEncoder
from experiments.input.checking import OnBad
from experiments.input.records import Rated
from experiments.input.sources import Records
from experiments.input.tokenized import Tokenized, tokenize
from experiments.tasks.batching import NO_LABEL, Batch

_NAMED = 3  # records that are too long and named


class AnswerBatches:
    """Batches by step of the records that fit into the length; the others are never used, and never truncated.

    A batch is a dict of arrays `[batch_size, rows, length]`, without the axis of rows for problems: `tokens`;
    `segments`, 1 at tokens and 0 at padding; `labels`, the next token where it belongs to an answer, otherwise
    `NO_LABEL`. The rows of a preference are its chosen and its rejected answer. Those of a rated answer are itself, and
    its prompt with the answer of another record of the batch, truncated to the length; a batch of these also has
    `desirable: bool[batch_size]`. `index: int32[batch_size]` is the number of the record, or -1 in an empty row, which
    pads the last batch of an epoch. All epochs have the same records in different orders.

    Args:
      data: From :class:`experiments.input.answers.AnswerEncoder`, with the same number of examples for each record.
      length: The length of a row.
      batch_size: Records per batch.
      seed: Random seed of the orders. None keeps the order of the records.
      desirable: Whether each record's answer is good, for rated answers.

    Attributes:
      data: The tokenized examples.
      steps_per_epoch: Batches per epoch.
      batch_size: Records per batch.
      truncated: `bool[examples]`, all False.
      unused: `bool[examples]`, whether the record of an example is too long.

    Raises:
      UserError: No record fits into the length.
    """

    unused_reason = "longer than"

    def __init__(
        self,
        data: Tokenized,
        *,
        length: int,
        batch_size: int,
        seed: int | None,
        desirable: np.ndarray | None = None,
    ):
        self.data, self.batch_size = data, batch_size
        self._length, self._seed, self._desirable = length, seed, desirable
        self._begins = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
        (firsts,) = np.nonzero(np.diff(data.owners, prepend=-1))
        self._examples = firsts[:, None] + np.arange(len(data) // max(len(firsts), 1))  # by record and row
        self.longest = data.lengths[self._examples].max(axis=1)
        fits = self.longest <= length
        (self._usable,) = np.nonzero(fits)
        if not len(self._usable):
            raise UserError(
                f"none of {len(firsts):,} records fits into {length:,} tokens; the shortest has "
                f"{self.longest.min():,}, and --length {self.longest.max():,} keeps everything"
            )
        self.unused, self.truncated = np.zeros(len(data), bool), np.zeros(len(data), bool)
        self.unused[self._examples[~fits]] = True
        self.steps_per_epoch = -(-len(self._usable) // batch_size)
        self._order = lru_cache(maxsize=2)(self._permutation)  # threads that read ahead may be in two epochs

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns rows of the batch of a step."""
        numbers = self._numbers(step)
        others = self._others(numbers, step)
        count = 2 if self._desirable is not None else self._examples.shape[1]
        shape = (len(numbers[rows]), count, self._length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments")}
        batch["labels"] = np.full(shape, NO_LABEL, np.int32)
        for slot, (number, other) in enumerate(zip(numbers[rows], others[rows])):
            if number >= 0:
                for row in range(count):
                    self._fill(batch, (slot, row), *self._content(number, other, row))
        if count == 1:
            batch = {name: array[:, 0] for name, array in batch.items()}
        batch["index"] = np.where(numbers < 0, -1, self.data.owners[self._examples[numbers, 0]])[rows].astype(np.int32)
        if self._desirable is not None:
            batch["desirable"] = self._desirable[batch["index"]] & (batch["index"] >= 0)
        return batch

    def examples(self, step: int) -> int:
        """Returns the number of records in the batch of a step."""
        return int((self._numbers(step) >= 0).sum())

    def tokens(self, step: int) -> int:
        """Returns the number of tokens, without padding, in the batch of a step."""
        return int(self[step]["segments"].sum())

    def labels(self, step: int) -> int:
        """Returns the number of labels in the batch of a step."""
        return int((self[step]["labels"] != NO_LABEL).sum())

    def _content(self, number: int, other: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of a row and which of them are predicted."""
        if self._desirable is None or not row:
            return self._example(self._examples[number, row])
        (tokens, targets), (others, answered) = (
            self._example(self._examples[number, 0]),
            self._example(self._examples[other, 0]),
        )
        start, first = (self.data.firsts[self._examples[index, 0]] for index in (number, other))
        tokens, targets = np.append(tokens[:start], others[first:]), np.append(targets[:start], answered[first:])
        return tokens[: self._length], targets[: self._length]

    def _example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self._begins[index], self._begins[index] + self.data.lengths[index])
        return self.data.tokens[span], self.data.targets[span]

    def _fill(self, batch: Batch, slot: tuple[int, int], tokens: np.ndarray, targets: np.ndarray) -> None:
        size = len(tokens)
        batch["tokens"][slot][:size] = tokens
        batch["segments"][slot][:size] = 1
        batch["labels"][slot][: size - 1] = np.where(targets[1:], tokens[1:].astype(np.int32), NO_LABEL)

    def _numbers(self, step: int) -> np.ndarray:
        """Returns the indices of the examples of a batch; -1 for an empty row."""
        epoch, index = divmod(step, self.steps_per_epoch)
        numbers = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)

    def _others(self, numbers: np.ndarray, step: int) -> np.ndarray:
        """Returns another example of the batch for each, or of the epoch for the only one of a batch."""
        (places,) = np.nonzero(numbers >= 0)
        others = numbers.copy()
        others[places] = numbers[np.roll(places, 1)]
        if len(places) == 1:
            others[places] = self._order(step // self.steps_per_epoch)[0]
        return others

    def _permutation(self, epoch: int) -> np.ndarray:
        usable = self._usable
        return usable if self._seed is None else np.random.default_rng([self._seed, epoch]).permutation(usable)


def answer_batches(
    records: Records,
    encoder: AnswerEncoder,
    directory: Path,
    *,
    length: int,
    global_batch: int,
    seed: int | None,
    on_bad: OnBad = "error",
    report: Callable[[str], None] = lambda line: None,
) -> AnswerBatches:
    """Tokenizes preferences, rated answers or problems and assembles global batches, the same in every process.

    Args:
      records: Records of one type, which :func:`experiments.input.checking.check_records` ensures.
      encoder: The encoder.
      directory: The directory of the tokens, see :func:`experiments.input.tokenized.tokenize`.
      length: The length of a row.
      global_batch: Records per batch, over all processes.
      seed: Random seed of the order. None keeps the order of the records.
      on_bad: Whether to raise an error or to skip records that cannot be encoded.
      report: Called with lines that describe the batches and name records that are too long.

    Raises:
      UserError: A record is malformed, tokens cannot be written, or no record fits.
    """
    data = tokenize(records, encoder, directory, on_bad=on_bad, report=report)
    owners = np.unique(data.owners)
    desirable = None
    if isinstance(records[int(owners[0])], Rated):
        desirable = np.zeros(len(records), bool)
        for owner in owners.tolist():
            record = records[owner]
            desirable[owner] = isinstance(record, Rated) and record.label
    batches = AnswerBatches(data, length=length, batch_size=global_batch, seed=seed, desirable=desirable)
    for note, count in data.notes.items():
        report(f"{count:,} of {len(records):,} records: {note}")
    (long,) = np.nonzero(batches.longest > length)
    if len(long):
        names = [f"{records.location(int(owners[i]))} ({batches.longest[i]:,})" for i in long[:_NAMED]]
        more = f" and {len(long) - _NAMED:,} more" if len(long) > _NAMED else ""
        report(
            f"skipped: {len(long):,} longer than {length:,} tokens: {', '.join(names)}{more}; "
            f"--length {batches.longest.max():,} keeps everything"
        )
    report(f"{len(owners) - len(long):,} records; {batches.steps_per_epoch:,} batches of {global_batch:,} per epoch")
    return batches
