"""Codes, scales and values against bitsandbytes', and the errors that quantizing makes."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.quantization import codebooks

BITSANDBYTES = np.load(pathlib.Path(__file__).parents[1] / "fixtures/quantization/bitsandbytes.npz")
CASES = sorted({name.split("/")[0] for name in BITSANDBYTES if "/" in name})
FORMATS = {"nf4": lora.NF4, "fp4": lora.FP4}
ALL = (lora.NF4, lora.FP4, lora.Int8, lora.Int4)


def stored(name):
    """A stored weight as a kernel `[in, out]`, and its block."""
    weight = BITSANDBYTES[f"{name}/weight"]
    weight = jnp.asarray(weight)
    if weight.dtype == jnp.int16:
        weight = weight.view(jnp.bfloat16)
    return weight.T, 128 if name == "block_128" else 64


def quantized(weight, form):
    return lora.quantize({"w": weight}, {"w": form})["w"]


def relative(leaf, weight):
    return float(jnp.linalg.norm(leaf.dequantize() - weight) / jnp.linalg.norm(weight))


def nibbles(leaf):
    """The codes in the order of PyTorch's `[out, in]`."""
    block = leaf.format.block
    packed = np.asarray(leaf.codes).T.reshape(leaf.shape[1], -1, block // 2)
    return np.concatenate([packed >> 4, packed & 15], axis=-1).reshape(-1)


def test_the_dynamic_map_is_bitsandbytes():
    np.testing.assert_array_equal(codebooks.dynamic_map(), BITSANDBYTES["dynamic_map"])
    assert codebooks.dynamic_map()[127] == 0.0


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_codes_scales_and_values_are_bitsandbytes_bit_for_bit(name, kind):
    weight, block = stored(name)
    leaf = quantized(weight, FORMATS[kind](block, double=False, axes=("in", "out")))
    packed = BITSANDBYTES[f"{name}/{kind}/packed"]
    np.testing.assert_array_equal(nibbles(leaf), np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1))
    np.testing.assert_array_equal(np.asarray(leaf.scales).T.reshape(-1), BITSANDBYTES[f"{name}/absmax"])
    values = leaf.dequantize()
    assert values.dtype == weight.dtype
    np.testing.assert_array_equal(values.T.astype(jnp.float32), BITSANDBYTES[f"{name}/{kind}/dequantized"])


@pytest.mark.parametrize("name", CASES)
def test_double_quantization_is_bitsandbytes_where_the_mean_is(name):
    weight, block = stored(name)
    leaf = quantized(weight, lora.NF4(block, axes=("in", "out")))
    offset, theirs = np.asarray(leaf.scales.offset), BITSANDBYTES[f"{name}/double/offset"]
    # Their mean depends on the order in which torch adds; ours on none. Both round.
    np.testing.assert_allclose(offset, theirs, rtol=3e-7)
    codes = np.asarray(leaf.scales.codes).T.reshape(-1).astype(int)
    difference = np.abs(codes - BITSANDBYTES[f"{name}/double/absmax"])
    assert difference.max() <= (offset != theirs) and difference.sum() <= 1
    np.testing.assert_allclose(leaf.scales.second, BITSANDBYTES[f"{name}/double/second"], rtol=1e-5)
    if offset == theirs:
        assert not difference.any()
        values = leaf.dequantize().T.astype(jnp.float32)  # a compiler may fuse a product and a sum
        np.testing.assert_allclose(values, BITSANDBYTES[f"{name}/double/dequantized"], rtol=3e-7)


def test_equal_offsets_occur():
    """The comparison of codes above, where the means are equal bits, is of something."""
    leaves = {name: quantized(stored(name)[0], lora.NF4(stored(name)[1], axes=("in", "out"))) for name in CASES}
    same = [name for name in CASES if leaves[name].scales.offset == BITSANDBYTES[f"{name}/double/offset"]]
    assert len(same) >= 3


@pytest.mark.parametrize("double", [False, True])
def test_the_error_of_nf4_on_normal_weights_is_the_published_one(double):
    weight = jax.random.normal(jax.random.key(0), (1024, 512))
    error = relative(quantized(weight, lora.NF4(double=double, axes=("in", "out"))), weight)
    assert abs(error - 0.092) < 0.001


def test_more_bits_and_better_levels_are_nearer():
    weight = jax.random.normal(jax.random.key(0), (1024, 64))
    errors = {form: relative(quantized(weight, form(axes=("in", "out"))), weight) for form in ALL}
    assert errors[lora.Int8] < 0.01 < errors[lora.NF4] < errors[lora.Int4] < errors[lora.FP4]


def test_4_127_bits_a_weight_all_told():
    leaf = quantized(jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), lora.NF4(axes=("in", "out")))
    assert round(leaf.bits, 3) == 4.127 and leaf.nbytes / leaf.size < 0.53


@pytest.mark.parametrize("form", ALL)
def test_every_code_is_decoded_to_the_value_that_is_encoded_to_it(form):
    codes = jnp.arange(2**form.bits, dtype=jnp.uint8)
    values = form().decode(codes)
    again = form().decode(form().encode(values))
    outside = jnp.abs(values) > 1  # the integers below the smallest: codes that nothing is encoded to
    np.testing.assert_array_equal(again[~outside], values[~outside])
    assert int(outside.sum()) == (form in (lora.Int8, lora.Int4))


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("double", [False, True])
def test_blocks_of_zeros_and_very_small_and_very_large_weights(form, double):
    weight = jax.random.normal(jax.random.key(0), (128, 4))
    weight = weight.at[:64, 0].set(0.0).at[:64, 1].multiply(1e-30).at[:64, 2].multiply(1e30)
    small = quantized(weight * 1e-3, form(double=double, axes=("in", "out"))).dequantize()
    assert jnp.isfinite(small).all()
    leaf = quantized(weight, form(double=False, axes=("in", "out")))
    values = leaf.dequantize()
    assert jnp.isfinite(values).all() and (values[:64, 0] == 0).all()
    for column in (1, 2):
        np.testing.assert_allclose(
            values[:64, column], weight[:64, column], atol=0.2 * jnp.abs(weight[:64, column]).max()
        )
    huge = quantized(jnp.full((64, 2), 3e38), form(double=False, axes=("in", "out")))
    np.testing.assert_allclose(huge.dequantize(), jnp.full((64, 2), 3e38), rtol=1e-6)
    zeros = quantized(jnp.zeros((64, 2)), form(double=double, axes=("in", "out")))
    np.testing.assert_array_equal(zeros.dequantize(), jnp.zeros((64, 2)))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("form", ALL)
def test_what_is_not_finite_stays_so_where_nothing_can_be_raised(form, double, value):
    weight = jax.random.normal(jax.random.key(0), (128, 4)).at[3, 1].set(value)
    tree = jax.jit(lambda w: lora.quantize({"w": w}, {"w": form(double=double, axes=("in", "out"))}))(weight)
    values = tree["w"].dequantize()
    assert not jnp.isfinite(values[3, 1])
    assert double or jnp.isfinite(values[64:]).all()


def test_a_double_that_is_no_boolean_is_refused():
    with pytest.raises(ValueError, match=r"NF4\(double='yes'\): expected True or False"):
        lora.NF4(64, "yes")


@pytest.mark.parametrize("block", [0, -64, 63, 64.0, True])
def test_a_wrong_block_is_refused(block):
    with pytest.raises(ValueError, match=r"NF4\(block=.*positive even number"):
        lora.NF4(block)
