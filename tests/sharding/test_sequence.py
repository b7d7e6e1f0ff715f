"""Tokens divided along the length of their sequence, over an axis of its own or over the tensor axis."""

import pytest

from sharding.collectives import moved_tokens
from sharding.problem import (
    BATCH,
    LENGTH,
    RANK,
    SEQUENCES,
    WIDTH,
    alone,
    assert_at_home,
    assert_same,
    model,
    placed,
    started,
    text_of,
    trained,
)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_step_on_divided_sequences_is_the_step_of_one_device(name):
    layout = SEQUENCES[name]
    mesh = layout.mesh()
    got = trained(model(layout, mesh), *placed(layout, mesh, *started()), flatten=False)
    assert_same(got, alone())
    assert_at_home(got.state, layout, mesh)
    # No tokens are gathered but those that the base's products need: before up, and the gradient of what down gave.
    needed = [(BATCH // 2, LENGTH, WIDTH)] * 2 if name == "over_tensor" else []
    assert moved_tokens(got.text, WIDTH, RANK) == needed


@pytest.mark.parametrize("name", ["sequence", "data_sequence_tensor"])
def test_flattened_tokens_would_be_gathered(name):
    """What the test before would find."""
    layout = SEQUENCES[name]
    mesh = layout.mesh()
    text = text_of(model(layout, mesh), *placed(layout, mesh, *started()), flatten=True)
    assert (BATCH // layout.sizes.get("data", 1), LENGTH, WIDTH) in moved_tokens(text, WIDTH, RANK)
