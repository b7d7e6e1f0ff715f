"""The batches of a training run as a function of the step, so that a resumed run sees the same batches."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from experiments.tasks.batching import NO_LABEL, Batch, Labels, Planned, assemble, plan


class Stream:
    """Shuffled passes over the data: `stream[step]` is the batch of that step.

    Args:
      sequences: Token ids, one array per example.
      labels: `int32[examples]`, or one array per example with a label for each token.
      lengths: The static lengths that batches are padded to.
      batch_size: The number of examples per batch.
      seed: The seed of the order of examples, which differs between passes.

    Attributes:
      steps_per_epoch: The number of batches per pass.
      batch_size: The number of examples per batch.
    """

    def __init__(
        self,
        sequences: Sequence[np.ndarray],
        labels: Labels,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
    ):
        self._sequences, self._labels = sequences, labels
        self._lengths, self.batch_size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = len(plan(sequences, lengths, batch_size))
        self._plan = lru_cache(maxsize=2)(self._pass)  # prefetching threads may be in two passes

    def __getitem__(self, step: int) -> Batch:
        return self.rows(step, slice(None))

    def rows(self, step: int, rows: slice) -> Batch:
        """Returns the given rows of the batch `stream[step]`."""
        planned = self._planned(step)
        count = len(range(self.batch_size)[rows])
        return assemble(planned._replace(indices=planned.indices[rows]), self._sequences, self._labels, count)

    def examples(self, step: int) -> int:
        """Returns the number of examples in the batch of a step."""
        return len(self._planned(step).indices)

    def tokens(self, step: int) -> int:
        """Returns the number of tokens, without padding, in the batch of a step."""
        return sum(len(self._sequences[index]) for index in self._planned(step).indices)

    def labels(self, step: int) -> int:
        """Returns the number of labels in the batch of a step: one of each example, or those of its tokens."""
        indices = self._planned(step).indices
        return int(sum(np.sum(np.asarray(self._labels[index]) != NO_LABEL) for index in indices))

    def _planned(self, step: int) -> Planned:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._plan(epoch)[index]

    def _pass(self, epoch: int) -> list[Planned]:
        rng = np.random.default_rng([self._seed, epoch])
        return plan(self._sequences, self._lengths, self.batch_size, rng)
