"""Batches of static shapes: nothing lost, nothing twice, the same again after a resume."""

import numpy as np
import pytest

from experiments.tasks.batching import NO_LABEL, assemble, plan
from experiments.training.stream import Stream

LENGTHS = (4, 6, 9)


@pytest.fixture
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 50, size).astype(np.int32) for size in rng.integers(2, 10, 103)]


@pytest.mark.parametrize("shuffled", [False, True])
def test_plan_holds_every_example_once_where_it_fits(sequences, shuffled):
    planned = plan(sequences, LENGTHS, 8, np.random.default_rng(1) if shuffled else None)
    assert sorted(np.concatenate([batch.indices for batch in planned])) == list(range(len(sequences)))
    assert all(len(sequences[i]) <= batch.length for batch in planned for i in batch.indices)
    assert sorted(len(batch.indices) for batch in planned)[1:] == [8] * (len(planned) - 1)
    assert {batch.length for batch in planned} <= set(LENGTHS)


def test_short_examples_are_not_padded_to_the_longest(sequences):
    planned = plan(sequences, LENGTHS, 8)
    assert sum(batch.length == 4 for batch in planned) > len(planned) / 5


def test_assembled_rows(sequences):
    labels = np.arange(len(sequences), dtype=np.int32)
    batch = assemble(plan(sequences, LENGTHS, 8)[-1], sequences, labels, 8)
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32 and batch["mask"].dtype == bool
    count = int(batch["weights"].sum())
    assert count == len(sequences) % 8
    for row in range(count):
        expected = sequences[batch["labels"][row]]
        assert batch["tokens"][row, batch["mask"][row]].tolist() == expected.tolist()
    assert not batch["mask"][count:].any() and not batch["weights"][count:].any()


def test_labels_of_tokens_are_padded_beside_them(sequences):
    labels = [sequence + 100 for sequence in sequences]
    for planned in plan(sequences, LENGTHS, 8):
        batch = assemble(planned, sequences, labels, 8)
        assert batch["labels"].dtype == np.int32 and batch["labels"].shape == batch["tokens"].shape
        np.testing.assert_array_equal(batch["labels"], np.where(batch["mask"], batch["tokens"] + 100, NO_LABEL))


def test_stream_is_a_function_of_seed_and_step(sequences):
    labels = np.zeros(len(sequences), np.int32)
    one, other, third = (Stream(sequences, labels, LENGTHS, 8, seed) for seed in (0, 0, 1))
    steps = range(2 * one.steps_per_epoch)
    batches = [one[step]["tokens"] for step in steps]
    for step in reversed(steps):
        np.testing.assert_array_equal(other[step]["tokens"], batches[step])
    different = [not np.array_equal(third[step]["tokens"], batches[step]) for step in steps]
    assert sum(different) > len(steps) / 2
    epochs = np.split(np.array([one.examples(step) for step in steps]), 2)
    assert epochs[0].sum() == epochs[1].sum() == len(sequences)
