"""Sequences of many lengths, cut into batches of a few static shapes.

Padding to the longest text would make most of the arithmetic padding, a shape a batch would compile a program
a batch. Here every sequence goes to the smallest of a few lengths that holds it, and every batch is full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]
Labels = np.ndarray | Sequence[np.ndarray]
"""`int32[examples]`; or an array an example with a label for each of its tokens."""

NO_LABEL = -1


class Planned(NamedTuple):
    """Which examples stand in a batch, and the length to which they are padded."""

    indices: np.ndarray
    length: int


def plan(
    sequences: Sequence[np.ndarray],
    lengths: Sequence[int],
    batch_size: int,
    rng: np.random.Generator | None = None,
) -> list[Planned]:
    """Cuts one pass over the data into batches.

    Args:
      sequences: Token ids, an array an example.
      lengths: The static lengths, ascending; the last one holds every sequence.
      batch_size: Examples a batch. What does not fill a batch joins the next longer one; only the very
        last batch may be short of examples.
      rng: Shuffles the examples and the batches; None keeps their order.

    Returns:
      Batches that together hold every example once: a function of the arguments and nothing else.
    """
    order = np.arange(len(sequences)) if rng is None else rng.permutation(len(sequences))
    sizes = np.array([len(sequence) for sequence in sequences])
    bucket = np.searchsorted(lengths, sizes)
    planned: list[Planned] = []
    waiting = np.array([], order.dtype)
    for position, length in enumerate(lengths):
        waiting = np.concatenate([waiting, order[bucket[order] == position]])
        full = len(waiting) if length == lengths[-1] else len(waiting) - len(waiting) % batch_size
        planned += [Planned(waiting[i : i + batch_size], length) for i in range(0, full, batch_size)]
        waiting = waiting[full:]
    return planned if rng is None else [planned[i] for i in rng.permutation(len(planned))]


def assemble(planned: Planned, sequences: Sequence[np.ndarray], labels: Labels, batch_size: int) -> Batch:
    """The arrays of a planned batch; rows beyond its examples have weight 0.

    Returns:
      `tokens` int32 and `mask` bool [batch_size, length], `labels` int32 and `weights` float32 [batch_size];
      labels of tokens are [batch_size, length], `NO_LABEL` at padding.
    """
    batch: Batch = {
        "tokens": np.zeros((batch_size, planned.length), np.int32),
        "mask": np.zeros((batch_size, planned.length), bool),
        "labels": np.zeros(batch_size, np.int32),
        "weights": np.zeros(batch_size, np.float32),
    }
    for row, index in enumerate(planned.indices):
        sequence = sequences[index]
        batch["tokens"][row, : len(sequence)] = sequence
        batch["mask"][row, : len(sequence)] = True
    if isinstance(labels, np.ndarray):
        batch["labels"][: len(planned.indices)] = labels[planned.indices]
    else:
        batch["labels"] = np.full(batch["tokens"].shape, NO_LABEL, np.int32)
        for row, index in enumerate(planned.indices):
            batch["labels"][row, : len(labels[index])] = labels[index]
    batch["weights"][: len(planned.indices)] = 1
    return batch
