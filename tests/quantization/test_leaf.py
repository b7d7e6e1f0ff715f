"""A quantized leaf as a pytree: shapes, slices, prints, damage."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from quantized_bases import FORMATS, quantize

import lora_jax as lora
from lora_jax.quantization.scales import Scales

AXES = {
    "kernel": ("in", "out"),
    "transposed": ("out", "in"),
    "heads": ("in", "out", "out"),
    "heads_out": ("in", "in", "out"),
    "apart": ("in", "out", "in"),
    "layers": ("batch", "in", "out"),
    "experts": ("batch", "batch", "in", "out"),
    "experts_inside": ("in", "batch", "out"),
    "lookup": ("lookup", "out"),
    "convolution": ("in", "in", "in", "out"),
}
SIZES = {"in": (24, 5, 3), "out": (6, 7), "batch": (3, 2), "lookup": (11,)}


def make(name, form=None):
    queues = {role: iter(sizes) for role, sizes in SIZES.items()}
    shape = tuple(next(queues[role]) for role in AXES[name])
    weight = jax.random.normal(jax.random.key(len(name)), shape)
    form = dataclasses.replace(form or lora.NF4(block=8), axes=AXES[name])
    return weight, quantize({"w": weight}, {"w": form})["w"]


@pytest.mark.parametrize("form", [lora.Int8(8, False), lora.Int8(8, True), lora.Q8_0()], ids=str)
@pytest.mark.parametrize("name", AXES)
def test_a_leaf_has_the_shape_and_nearly_the_values_of_its_weight(name, form):
    weight, leaf = make(name, form)
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == (weight.shape, weight.ndim, weight.size, weight.dtype)
    values = leaf.dequantize()
    assert (values.shape, values.dtype) == (weight.shape, weight.dtype)
    np.testing.assert_allclose(values, weight, atol=0.03)
    np.testing.assert_array_equal(np.asarray(leaf), values)


@pytest.mark.parametrize("form", [lora.NF4(8), lora.Q8_0(), lora.Q4_0(), lora.Q4_1()], ids=lambda form: form.name)
@pytest.mark.parametrize("name", ["layers", "experts"])
def test_layers_and_experts_have_blocks_and_scales_of_their_own(name, form):
    weight, leaf = make(name, form)
    form = dataclasses.replace(form, axes=AXES[name])
    changed = lora.quantize({"w": weight.at[0].multiply(100.0)}, {"w": form})["w"]
    for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(changed)):
        np.testing.assert_array_equal(one[1:], other[1:])
    alone = lora.quantize({"w": weight[1]}, {"w": dataclasses.replace(form, axes=AXES[name][1:])})["w"]
    sliced = jax.tree.map(lambda array: array[1], leaf)
    assert jax.tree.structure(sliced) == jax.tree.structure(alone) and sliced.shape == alone.shape
    for one, other in zip(jax.tree.leaves(sliced), jax.tree.leaves(alone)):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(jax.vmap(lambda leaf: leaf.dequantize())(leaf), leaf.dequantize())
    np.testing.assert_array_equal(
        jax.lax.scan(lambda _, leaf: (None, leaf.dequantize()), None, leaf)[1], leaf.dequantize()
    )


@pytest.mark.parametrize("form", FORMATS)
def test_leaves_stack(form):
    weight, leaf = make("kernel", FORMATS[form])
    both = jax.tree.map(lambda *arrays: jnp.stack(arrays), leaf, leaf)
    assert both.shape == (2, *weight.shape)
    np.testing.assert_array_equal(both.dequantize()[1], leaf.dequantize())


def test_what_padding_costs_is_in_the_bits():
    _, exact = make("kernel", lora.NF4(block=8, double=False, axes=AXES["kernel"]))
    _, padded = make("kernel", lora.NF4(block=20, double=False, axes=AXES["kernel"]))
    assert exact.bits == 4 + 32 / 8
    assert padded.bits == (4 + 32 / 20) * 40 / 24  # 24 weights in blocks of 20 take 40 places
    assert f"{padded.bits:.3f} bits" in repr(padded)


@pytest.mark.parametrize(
    "form, text",
    [
        (None, "NF4[3, 24, 6](dtype=float32, block=8, double, {:.3f} bits)"),
        (lora.Q4_1(), "Q4_1[3, 24, 6](dtype=float32, block=32, {:.3f} bits)"),
        (lora.Q4_K(), "Q4_K[3, 24, 6](dtype=float32, block=256, {:.3f} bits)"),
    ],
    ids=str,
)
def test_a_leaf_prints_its_format_shape_dtype_and_bits(form, text):
    _, leaf = make("layers", form)
    assert repr(leaf) == text.format(leaf.bits)
    again = pickle.loads(pickle.dumps(leaf))
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    np.testing.assert_array_equal(again.dequantize(), leaf.dequantize())
    mask = jax.tree.map(lambda _: False, leaf)
    assert "False" in repr(mask)


def test_a_leaf_of_shapes_has_a_shape():
    shape = jax.ShapeDtypeStruct((3, 24, 6), jnp.bfloat16)
    leaf = lora.quantize({"w": shape}, {"w": lora.NF4(block=8, axes=AXES["layers"])})["w"]
    assert all(isinstance(array, jax.ShapeDtypeStruct) for array in jax.tree.leaves(leaf))
    assert (leaf.shape, leaf.dtype, leaf.nbytes) == ((3, 24, 6), jnp.bfloat16, make("layers")[1].nbytes)


@pytest.mark.parametrize("part", ["codes", "scales", "second"])
def test_cut_arrays_are_told(part):
    _, leaf = make("kernel")
    cut = {
        "codes": dataclasses.replace(leaf, codes=leaf.codes[:-1]),
        "scales": dataclasses.replace(leaf, scales=dataclasses.replace(leaf.scales, codes=leaf.scales.codes[:, 1:])),
        "second": dataclasses.replace(leaf, scales=dataclasses.replace(leaf.scales, second=leaf.scales.second[1:])),
    }[part]
    with pytest.raises(ValueError, match="arrays do not fit each other"):
        cut.dequantize()


def test_arrays_that_were_cast_are_told():
    _, leaf = make("kernel")
    cast = jax.tree.map(lambda array: array.astype(jnp.bfloat16) if array.dtype == jnp.float32 else array, leaf)
    with pytest.raises(ValueError, match="Cast the weight before it is quantized"):
        cast.dequantize()
    with pytest.raises(ValueError, match="arrays are int32, uint8"):
        dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int32)).dequantize()


def test_cut_blocks_of_a_file_are_told():
    _, leaf = make("kernel", lora.Q4_K())
    with pytest.raises(ValueError, match=r"in Q4_K\(.*: its arrays do not fit .* codes \(143, 6\); .* \(144, 6\)"):
        dataclasses.replace(leaf, codes=leaf.codes[:-1]).dequantize()
    with pytest.raises(ValueError, match="its arrays are int32; expected uint8"):
        dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int32)).dequantize()


def test_any_codes_are_some_weight():
    """Every byte is two codes, so that a flipped bit is another weight of the block's size, never NaN."""
    _, leaf = make("kernel")
    damaged = dataclasses.replace(leaf, codes=leaf.codes ^ jnp.uint8(0xA5))
    values = damaged.dequantize()
    assert jnp.isfinite(values).all() and jnp.abs(values).max() <= 1.01 * jnp.abs(leaf.dequantize()).max()


def test_a_damaged_scale_shows():
    _, leaf = make("kernel", lora.NF4(block=8, double=False, axes=AXES["kernel"]))
    damaged = dataclasses.replace(leaf, scales=leaf.scales.at[0, 0].set(jnp.nan))
    values = damaged.dequantize()
    assert jnp.isnan(values[:8, 0]).all() and jnp.isfinite(values[8:]).all()


def test_the_mean_of_scales_does_not_depend_on_their_order():
    scales = jnp.abs(jax.random.normal(jax.random.key(0), (1000, 7)))
    shuffled = jax.random.permutation(jax.random.key(1), scales)
    one, other = (Scales.of(x, 0, -2).offset for x in (scales, shuffled))
    assert one == other
    np.testing.assert_allclose(one, np.asarray(scales, np.float64).mean(), rtol=3e-7)


@pytest.mark.parametrize("form", FORMATS)
def test_orbax_keeps_a_leaf(tmp_path, form):
    _, leaf = make("layers", FORMATS[form])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", {"w": leaf})
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"w": leaf})
        again = checkpointer.restore(tmp_path / "base", shapes)["w"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(leaf)):
        np.testing.assert_array_equal(one, other)
