"""Initializers, checkpoints of adapters, merging and analysis over quantized bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_bases import FORMATS, quantize

import lora_jax as lora
from lora_jax.initializers import EVA, LoftQ, PiSSA
from lora_jax.leaves import is_quantized
from lora_jax.merging import merge_quantized

FORM = lora.NF4(block=16)
X = jax.random.normal(jax.random.key(9), (8, 64))


def fn(base, x):
    return jnp.tanh(x @ base["up"]) @ base["down"]


@pytest.fixture
def floats(getkey):
    return {"up": jax.random.normal(getkey(), (64, 32)), "down": jax.random.normal(getkey(), (32, 16))}


@pytest.fixture
def base(floats):
    return lora.quantize(floats, {"": FORM}, fn, X)


def error(base, delta, floats, path="up"):
    return float(jnp.linalg.norm(lora.merge(base, delta)[path] - floats[path]))


@pytest.mark.parametrize("form, iterations", [(FORM, 1), (FORM, 3), (lora.Q4_0(), 1), (lora.Q4_1(), 1)], ids=str)
def test_loftq_makes_a_quantized_base_and_factors_nearer_to_the_weight(floats, form, iterations):
    spec, base = {"up": lora.LoRA(8, alpha=16, init=LoftQ(form, iterations))}, lora.quantize(floats, {"": form}, fn, X)
    moved, delta = lora.prepare(jax.random.key(0), floats, spec, fn, [X])
    assert moved["up"].format == form and moved["down"] is floats["down"]
    assert error(moved, delta, floats) < 0.9 * error(base, {}, floats)
    out = lora.adapt(fn)(moved, delta, X)
    np.testing.assert_allclose(out, fn(lora.merge(moved, delta), X), rtol=1e-4, atol=1e-3)


def test_loftq_over_a_quantized_base_says_that_it_comes_too_late(base):
    with pytest.raises(ValueError, match="'up': LoftQ compensates for the error of quantization, and this"):
        lora.prepare(jax.random.key(0), base, {"up": lora.LoRA(8, init=LoftQ(FORM))}, fn, [X])


def test_loftq_refuses_formats_that_are_only_read(floats):
    with pytest.raises(ValueError, match="'up': Q6_K is read from files only; weights cannot be quantized into it"):
        lora.prepare(jax.random.key(0), floats, {"up": lora.LoRA(8, init=LoftQ(lora.Q6_K()))}, fn, [X])


def test_loftq_wants_a_format_and_not_its_class():
    with pytest.raises(ValueError, match=r"LoftQ\(quantizer=NF4\): write NF4\(\)"):
        LoftQ(lora.NF4)


def test_pissa_before_quantizing_leaves_a_smaller_error_than_quantizing_alone(floats, base):
    """QPiSSA: what stays in the base is smaller, and so is what rounding takes from it."""
    spec = {"up": lora.LoRA(8, init="pissa")}
    moved, delta = lora.prepare(jax.random.key(0), floats, spec, fn, [X])
    small = lora.quantize(moved, {"": FORM}, fn, X)
    assert error(small, delta, floats) < error(base, {}, floats)


@pytest.mark.parametrize(
    "form, init", [(FORM, "pissa"), (FORM, PiSSA(niter=4)), (FORM, "olora"), (lora.Q4_1(), "pissa")], ids=str
)
def test_inits_that_move_a_part_of_a_quantized_weight_quantize_the_rest_again(floats, form, init):
    base = lora.quantize(floats, {"": form}, fn, X)
    moved, delta = lora.prepare(jax.random.key(0), base, {"up": lora.LoRA(8, init=init)}, fn, [X])
    assert is_quantized(moved["up"]) and moved["up"].format == form and moved["down"] is base["down"]
    before, after = base["up"].dequantize(), lora.merge(moved, delta)["up"]
    rounding = jnp.linalg.norm(moved["up"].dequantize()) * 0.12
    assert 0 < jnp.linalg.norm(after - before) < rounding


@pytest.mark.parametrize("init", [EVA(), "corda"], ids=str)
def test_inputs_of_quantized_weights_are_read(base, init):
    _, delta = lora.prepare(jax.random.key(0), base, {"": lora.LoRA(2, init=init)}, fn, [X])
    _, expected = lora.prepare(jax.random.key(0), lora.dequantize(base), {"": lora.LoRA(2, init=init)}, fn, [X])
    for path, node in delta.items():
        product = jnp.einsum("ri,ro->io", node.a, node.b)
        np.testing.assert_allclose(
            product, jnp.einsum("ri,ro->io", expected[path].a, expected[path].b), rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(jnp.abs(node.a), jnp.abs(expected[path].a), rtol=1e-3, atol=1e-3)


def test_gradients_of_quantized_weights_are_read(base):
    loss = lambda base, x: jnp.mean(fn(base, x) ** 2)  # noqa: E731
    spec = {"up": lora.LoRA(2, init="lora_ga")}
    moved, delta = lora.prepare(jax.random.key(0), base, spec, fn, [X], loss=loss)
    _, expected = lora.prepare(jax.random.key(0), lora.dequantize(base), spec, fn, [X], loss=loss)
    assert is_quantized(moved["up"])
    np.testing.assert_allclose(jnp.abs(delta["up"].a), jnp.abs(expected["up"].a), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recipe", [lora.DoRA(2), lora.DVoRA(2), lora.Full()], ids=lambda recipe: type(recipe).__name__)
def test_recipes_that_start_from_the_weight_start_from_what_it_stands_for(base, recipe):
    delta = lora.init(jax.random.key(0), base, {"up": recipe}, fn, X)
    expected = lora.init(jax.random.key(0), lora.dequantize(base), {"up": recipe}, fn, X)
    for one, other in zip(jax.tree.leaves(delta), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_rows_of_a_quantized_table():
    fn = lambda base: base["table"][jnp.asarray([1, 2, 7])]  # noqa: E731
    base = lora.quantize({"table": jax.random.normal(jax.random.key(0), (10, 64))}, {"table": FORM}, fn)
    delta = lora.init(jax.random.key(0), base, {"table": lora.Rows((2, 5))}, fn)
    train, frozen = lora.partition(delta)
    delta = lora.join(jax.tree.map(lambda leaf: leaf + 1.0, train), frozen)
    np.testing.assert_allclose(lora.adapt(fn)(base, delta), fn(lora.merge(base, delta)), rtol=1e-6)


def test_merge_gives_floats_everywhere(base):
    delta = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2, init="orthogonal")}, fn, X)
    merged = lora.merge(base, delta)
    assert not any(map(is_quantized, merged.values())) and merged["up"].dtype == jnp.float32
    np.testing.assert_allclose(fn(merged, X), lora.adapt(fn)(base, delta, X), rtol=1e-4, atol=1e-4)
    restored = lora.unmerge(merged, delta, base)
    np.testing.assert_array_equal(restored["up"], base["up"].dequantize())


@pytest.mark.parametrize("form", [FORM, lora.Q8_0(), lora.Q4_0(), lora.Q4_1()], ids=lambda form: form.name)
def test_merge_quantized_states_what_rounding_took(form, floats):
    base = lora.quantize(floats, {"": form}, fn, X)
    delta = lora.init(jax.random.key(0), base, {"": lora.LoRA(4)}, fn, X)
    train, frozen = lora.partition(delta)
    small = lora.join(jax.tree.map(lambda leaf: leaf + 1e-3, train), frozen)
    large = lora.join(jax.tree.map(lambda leaf: leaf + 1.0, train), frozen)
    merged, errors = merge_quantized(base, small)
    assert merged["up"].format == form and set(errors) == {"up", "down"}
    exact = lora.merge(base, small)["up"]
    lost = jnp.linalg.norm(merged["up"].dequantize() - exact)
    np.testing.assert_allclose(errors["up"].weight, lost / jnp.linalg.norm(exact), rtol=1e-5)
    # What changed less than the steps between levels is lost; what changed more is not.
    assert errors["up"].change > 0.5 > merge_quantized(base, large)[1]["up"].change
    _, nothing = merge_quantized(base, delta)
    assert nothing["up"].change == float("inf")


def test_merge_quantized_merges_other_weights_as_merge_does(floats, base):
    mixed = {"up": base["up"], "down": floats["down"]}
    delta = lora.init(jax.random.key(0), mixed, {"": lora.LoRA(4, init="orthogonal")}, fn, X)
    merged, errors = merge_quantized(mixed, delta)
    assert list(errors) == ["up"]
    np.testing.assert_array_equal(merged["down"], lora.merge(mixed, delta)["down"])
    with pytest.raises(ValueError, match="'upp', which is not in the base; nearest: 'up'"):
        merge_quantized(mixed, {"upp": delta["up"]})


@pytest.mark.parametrize("form", FORMATS)
def test_a_saved_adapter_knows_its_quantized_base(form, floats, tmp_path):
    form = FORMATS[form]
    base = quantize(floats, {"": form}, fn, X)
    delta = lora.init(jax.random.key(0), base, {"": lora.LoRA(4)}, fn, X)
    lora.save(tmp_path / "adapter", delta, base=base)
    lora.load(tmp_path / "adapter", base)
    other = quantize({"up": floats["up"] * 2, "down": floats["down"]}, {"": form}, fn, X)
    with pytest.raises(ValueError, match="up"):
        lora.load(tmp_path / "adapter", other)


def test_analysis_reads_what_a_quantized_weight_stands_for(base):
    delta = lora.init(jax.random.key(0), base, {"up": lora.DoRA(2)}, fn, X)
    train, frozen = lora.partition(delta)
    delta = lora.join(jax.tree.map(lambda leaf: leaf + 0.1, train), frozen)
    drift = lora.analysis.drift(delta, base)["up"]
    expected = lora.analysis.drift(delta, lora.dequantize(base))["up"]
    np.testing.assert_allclose([drift.magnitude, drift.direction], [expected.magnitude, expected.direction], rtol=1e-5)
