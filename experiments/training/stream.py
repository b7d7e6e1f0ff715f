"""The batches of a training run as a function of the step alone, so that a resumed run sees the same ones."""

from collections.abc import Sequence

import numpy as np

from experiments.tasks.batching import Batch, Labels, Planned, assemble, plan


class Stream:
    """Shuffled passes over the data: `stream[step]` is the batch of that step.

    Args:
      sequences: Token ids, an array an example.
      labels: `int32[examples]`, or an array an example with a label for each of its tokens.
      lengths: The static lengths that batches are padded to.
      batch_size: Examples a batch.
      seed: Of the order of the examples; every pass has another.
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
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.steps_per_epoch = len(plan(sequences, lengths, batch_size))
        self._epoch, self._plan = -1, list[Planned]()

    def __getitem__(self, step: int) -> Batch:
        return assemble(self._planned(step), self._sequences, self._labels, self._batch_size)

    def examples(self, step: int) -> int:
        """How many examples the batch of a step holds."""
        return len(self._planned(step).indices)

    def _planned(self, step: int) -> Planned:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self._seed, epoch])
            self._epoch, self._plan = epoch, plan(self._sequences, self._lengths, self._batch_size, rng)
        return self._plan[index]
