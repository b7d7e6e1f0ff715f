"""Batches of a few static shapes from sequences of many lengths.

Padding all sequences to the longest would waste most of the arithmetic, and a shape per batch would compile a program
per batch. Here every sequence is padded to the smallest sufficient length of a few, and every batch is full.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Batch = dict[str, np.ndarray]
Labels = np.ndarray | Sequence[np.ndarray]
"""`int32[examples]`, `float32[examples]` of a regression, or for each example an array with a label per token."""

NO_LABEL = -1


class Planned(NamedTuple):
    """The examples of a batch, and the length to which they are padded."""

    indices: np.ndarray
    length: int


def plan(
    sequences: Sequence[np.ndarray],
    lengths: Sequence[int],
    batch_size: int,
    rng: np.random.Generator | None = None,
) -> list[Planned]:
    """Assigns the examples of one epoch to batches.

    Args:
      sequences: The token ids of each example.
      lengths: The static lengths, ascending. The last is sufficient for every sequence.
      batch_size: Examples per batch. The remainder of a length is padded to the next length; only the last batch may
        have fewer examples.
      rng: Shuffles examples and batches; None keeps their order.

    Returns:
      Batches that contain every example once. The result depends only on the arguments.
    """
    order = np.arange(len(sequences)) if rng is None else rng.permutation(len(sequences))
    sizes = np.array([len(sequence) for sequence in sequences])
    bucket = np.searchsorted(lengths, sizes)
    planned: list[Planned] = []
    remaining = np.array([], order.dtype)
    for position, length in enumerate(lengths):
        remaining = np.concatenate([remaining, order[bucket[order] == position]])
        full = len(remaining) if length == lengths[-1] else len(remaining) - len(remaining) % batch_size
        planned += [Planned(remaining[i : i + batch_size], length) for i in range(0, full, batch_size)]
        remaining = remaining[full:]
    return planned if rng is None else [planned[i] for i in rng.permutation(len(planned))]


def assemble(planned: Planned, sequences: Sequence[np.ndarray], labels: Labels, batch_size: int) -> Batch:
    """Returns the arrays of a planned batch. Rows without an example have weight 0.

    Returns:
      `tokens` int32 and `mask` bool `[batch_size, length]`, `labels` int32 and `weights` float32 `[batch_size]`. Labels
      of a regression are float32; labels of tokens are `[batch_size, length]` and `NO_LABEL` at padding.
    """
    is_number = isinstance(labels, np.ndarray) and labels.dtype.kind == "f"
    batch: Batch = {
        "tokens": np.zeros((batch_size, planned.length), np.int32),
        "mask": np.zeros((batch_size, planned.length), bool),
        "labels": np.zeros(batch_size, np.float32 if is_number else np.int32),
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
