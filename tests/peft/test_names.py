"""Tables of names: leaves to tensors and back, in full and in part."""

import itertools

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.peft import CONV2D, LINEAR, Names, Weight

BINDINGS = {
    "as it is": Weight("w", "w").bind("w", (4, 6)),
    "transposed": Weight("w", "w", LINEAR).bind("w", (4, 6)),
    "window": Weight("w", "w", CONV2D).bind("w", (3, 2, 4, 6)),
    "heads": Weight("w", "w", "in heads width -> (heads width) in").bind("w", (4, 3, 2)),
    "fused": Weight("w", "{part=q|k|v}.w", "in (part out) -> out in").bind("w", (4, 6)),
    "stacked": Weight("h/{layer}/w", "h.{layer}.w", LINEAR).bind("h/w", (3, 4, 6)),
    "one layer": Weight("h/{layer}/w", "h.{layer}.w", LINEAR).bind("h/2/w", (4, 6)),
    "stacked and fused": Weight("h/{layer}/w", "h.{layer}.{part=k|v}.w", "in (part out) -> out in").bind(
        "h/w", (2, 4, 6)
    ),
    "experts": Weight("h/{layer}/w", "h.{layer}.{expert}.w", "expert in out -> out in").bind("h/w", (2, 3, 4, 6)),
}


def leaf(binding):
    return np.arange(np.prod(binding.shape), dtype=np.float32).reshape(binding.shape)


@pytest.mark.parametrize("name", BINDINGS)
def test_split_and_join_are_inverses(name):
    binding = BINDINGS[name]
    tensors = binding.split(leaf(binding))
    assert {n: value.shape for n, value in tensors.items()} == binding.shapes
    np.testing.assert_array_equal(binding.join(lambda n, part: tensors[n][part], np.float32), leaf(binding))


@pytest.mark.parametrize("name", BINDINGS)
def test_a_part_is_that_of_the_whole_and_reads_no_more(name):
    binding = BINDINGS[name]
    whole, read = leaf(binding), []
    tensors = binding.split(whole)

    def reading(n, part):
        read.append(n)
        return tensors[n][part]

    for axis in range(whole.ndim):
        for start, stop in itertools.combinations(range(whole.shape[axis] + 1), 2):
            window = [slice(None)] * whole.ndim
            window[axis] = slice(start, stop)
            read.clear()
            np.testing.assert_array_equal(binding.join(reading, np.float32, window), whole[tuple(window)])
            assert len(read) == len(set(read)) <= len(tensors)
            if name == "stacked" and axis == 0:
                assert len(read) == stop - start


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("w", "{layer}.w"), "layer"),
        (("w", "w", "in out"), "not of the form"),
        (("w", "w", "in out -> out out"), "malformed"),
        (("w", "w", "in out -> out"), "different axes"),
    ],
)
def test_rows_that_are_wrong(arguments, said):
    with pytest.raises(ValueError, match=said):
        Weight(*arguments)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (2, 4, 6)])
def test_a_shape_that_does_not_fit(shape):
    with pytest.raises(ValueError, match="'w' of shape"):
        Weight("w", "{part=q|k|v}.w", "in (part out) -> out in").bind("w", shape)


def test_a_path_without_a_name():
    names = Names((Weight("attention/kernel", "a.weight"),))
    with pytest.raises(ValueError, match=r"'atention/kernel'.*nearest: 'attention/kernel'"):
        names.find("atention/kernel", (2, 2))


def test_the_first_row_that_matches_counts():
    names = Names((Weight("h/{layer}/w", "by.{layer}"), Weight("h/0/w", "literal"), Weight("x", "x"), Weight("x", "y")))
    assert list(names.find("h/0/w", (2,)).tensors) == ["by.0"]
    assert list(names.find("h/w", (2, 3)).tensors) == ["by.0", "by.1"]
    assert names.get("h/0/v", (2,)) is None


def test_names_of_the_parts_of_one_leaf():
    row = Weight("h/{layer}/w", "h.{layer}.{expert}.{part=k|v}.w", "expert in (part out) -> out in")
    assert list(row.examples()) == ["h.0.0.k.w", "h.0.0.v.w"]
    assert row.declares("h.1.7.v.w") and not row.declares("h.1.v.w")


def test_former_names_state_the_present_ones():
    names = Names((Weight("w", "w"),))
    binding = names.find("w", (2, 2))
    with pytest.raises(AttributeError, match=r"lora_jax\.peft\.Place has been renamed to Binding"):
        _ = lora.peft.Place
    with pytest.raises(AttributeError, match=r"Names\.place has been renamed to get"):
        _ = names.place
    with pytest.raises(AttributeError, match=r"Binding\.left has been renamed to leaf_axes"):
        _ = binding.left
