"""Formats of GGUF files: bytes and values against the `gguf` package's, bit for bit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.merging import merge_quantized
from lora_jax.quantization import from_gguf

GGUF = np.load(pathlib.Path(__file__).parents[1] / "fixtures/quantization/gguf.npz")
BITS = {
    "Q8_0": 8.5,
    "Q4_0": 4.5,
    "Q4_1": 5.0,
    "Q5_0": 5.5,
    "Q5_1": 6.0,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
}
ENCODED = [name for name in BITS if "K" not in name]
READ_ONLY = [name for name in BITS if "K" in name]


def assert_equal_bits(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", BITS)
def test_values_are_those_of_the_gguf_package_bit_for_bit(name):
    blocks, values = GGUF[f"{name}/blocks"], GGUF[f"{name}/values"]
    leaf = from_gguf(blocks, name)
    assert (leaf.shape, leaf.bits, leaf.dtype, leaf.format) == (
        (1024, 3),
        BITS[name],
        jnp.float32,
        getattr(lora, name)(),
    )
    np.testing.assert_array_equal(np.asarray(leaf.codes).T, blocks)
    assert_equal_bits(leaf.dequantize().T, values)
    # In a larger program a product and a sum may be fused.
    assert_equal_bits(jax.jit(lambda leaf: leaf.dequantize().T * 1.0)(leaf), values)
    with jax.disable_jit():
        assert_equal_bits(leaf.dequantize().T, values)
    assert_equal_bits(from_gguf(blocks, name, ("lookup", "out")).dequantize(), values)


@pytest.mark.parametrize("name", ENCODED)
def test_encoded_bytes_are_those_of_the_gguf_package(name):
    weight, encoded = jnp.asarray(GGUF["weights"]), GGUF[f"{name}/encoded"]
    form = getattr(lora, name)
    leaf = lora.quantize({"w": weight.T}, {"w": form(axes=("in", "out"))})["w"]
    np.testing.assert_array_equal(np.asarray(leaf.codes).T, encoded)
    with jax.disable_jit():
        np.testing.assert_array_equal(form().quantize(weight, ("out", "in")).codes, encoded)
    again = leaf.requantized(leaf.dequantize())
    np.testing.assert_allclose(again.dequantize(), leaf.dequantize(), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("name", ENCODED)
def test_padding_and_numbers_that_are_not_finite(name):
    form = getattr(lora, name)
    weight = jax.random.normal(jax.random.key(0), (40, 3))
    leaf = lora.quantize({"w": weight}, {"w": form(axes=("in", "out"))})["w"]
    assert leaf.shape == (40, 3) and leaf.bits == BITS[name] * 64 / 40
    np.testing.assert_allclose(leaf.dequantize(), weight, atol=0.25)
    for value in (jnp.nan, jnp.inf, 1e7 if name == "Q8_0" else 2e6):
        with pytest.raises(ValueError, match=rf"'w' contains NaN, Inf or numbers beyond .* to {name}"):
            lora.quantize({"w": weight.at[3, 1].set(value)}, {"w": form(axes=("in", "out"))})
    traced = jax.jit(lambda w: lora.quantize({"w": w}, {"w": form(axes=("in", "out"))})["w"].dequantize())
    values = traced(weight.at[3, 1].set(jnp.nan))
    assert not jnp.isfinite(values[3, 1]) and jnp.isfinite(values[32:]).all() and jnp.isfinite(values[:, 0]).all()


def test_a_leaf_has_the_roles_and_the_shape_it_is_read_with():
    matrices, values = (GGUF[f"Q4_1/{part}"].reshape(3, 2, -1) for part in ("blocks", "values"))
    flat, wide = matrices.reshape(6, -1), values.reshape(6, 512)
    for axes, shape, expected in [
        (("in", "out"), None, wide.T),
        (("out", "in"), None, wide),
        (("lookup", "out"), None, wide),
        (("in", "out", "out"), (512, 3, 2), wide.T.reshape(512, 3, 2)),
        (("in", "in", "out"), (4, 128, 6), wide.T.reshape(4, 128, 6)),
        (("out", "in", "out"), (3, 512, 2), values.transpose(0, 2, 1)),
    ]:
        leaf = from_gguf(flat, "Q4_1", axes, shape=shape)
        assert leaf.shape == expected.shape
        assert_equal_bits(leaf.dequantize(), expected)
        alike = jax.eval_shape(lambda w, axes=axes: lora.Q4_1().quantize(w, axes), expected)
        assert jax.tree.structure(alike) == jax.tree.structure(leaf)
    for axes, order in [(("batch", "in", "out"), (0, 2, 1)), (("in", "batch", "out"), (2, 0, 1))]:
        leaf = from_gguf(matrices, "Q4_1", axes, dtype=jnp.bfloat16)
        assert leaf.dtype == jnp.bfloat16
        expected = jnp.asarray(values.transpose(order)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(leaf.dequantize().astype(jnp.float32), expected.astype(jnp.float32))


def test_leaves_of_layers_stack():
    rows = GGUF["Q4_K/blocks"]
    leaves = [from_gguf(rows[i : i + 1], 12) for i in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)
    assert stacked.shape == (3, 1024, 1) and repr(stacked) == "Q4_K[3, 1024, 1](dtype=float32, block=256, 4.500 bits)"
    assert_equal_bits(stacked.dequantize()[:, :, 0], GGUF["Q4_K/values"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b: from_gguf(b, "Q2_K"), r"Tensor type 'Q2_K'; expected one of Q4_0, Q4_1, .* Q6_K"),
        (lambda b: from_gguf(b, 10), "Tensor type 10; expected"),
        (
            lambda b: from_gguf(b[:, :-1], "Q4_1"),
            r"Q4_1 tensor of shape \(3, 639\) .* expected uint8.* blocks of 20 by",
        ),
        (lambda b: from_gguf(b.view(np.int8), "Q4_1"), "int8; expected uint8"),
        (lambda b: from_gguf(b, "Q4_1", ("batch", "in", "out")), "gives 3 roles; .* needs 2"),
        (lambda b: from_gguf(b, "Q4_1", ("in", "in")), "expected one axis 'in'"),
        (lambda b: from_gguf(b, "Q4_1", ("in", "ot")), "got the role 'ot'"),
        (lambda b: from_gguf(b, "Q4_1", shape=(3, 1024)), r"shape \(3, 1024\) .* has 1024 rows of 3 weights"),
        (lambda b: from_gguf(np.full_like(b, 255), "Q4_1"), "96 of 96 blocks have a scale that is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(GGUF["Q4_1/blocks"])


@pytest.mark.parametrize("name", READ_ONLY)
def test_formats_that_are_only_read_are_refused_by_name(name):
    form, leaf = getattr(lora, name), from_gguf(GGUF[f"{name}/blocks"], name)
    refused = rf"{name} is read from files only; weights cannot be quantized into it. Formats to quantize into are NF4"
    fn, x = lambda base, x: x @ base["w"], jnp.ones((1, 1024))
    with pytest.raises(ValueError, match=f"The rule 'w': {refused}"):
        lora.quantize({"w": leaf.dequantize()}, {"w": form()}, fn, x)
    with pytest.raises(ValueError, match=refused):
        leaf.requantized(leaf.dequantize())
    with pytest.raises(ValueError, match=f"'w': {refused}"):
        lora.prepare(jax.random.key(0), {"w": leaf}, {"w": lora.LoRA(2, init="pissa")}, fn, [x])
    delta = lora.init(jax.random.key(0), {"w": leaf}, {"w": lora.LoRA(2)}, fn, x)
    with pytest.raises(ValueError, match=f"'w': {refused}.*lora_jax.merge gives floats"):
        merge_quantized({"w": leaf}, delta)
    np.testing.assert_array_equal(lora.merge({"w": leaf}, delta)["w"], leaf.dequantize())


@pytest.mark.parametrize("name", BITS)
def test_a_weight_of_a_file_is_adapted(name):
    form = getattr(lora, name)
    blocks = GGUF[f"{name}/blocks"].reshape(3, -1, form.type_size)
    for start in form.halves:  # scales near 2⁻⁹
        blocks[..., start + 1] = blocks[..., start + 1] & 0x83 | 0x18
    base = {"w": from_gguf(blocks.reshape(3, -1), name)}
    fn, x = lambda base, x: jnp.tanh(x @ base["w"]), jax.random.normal(jax.random.key(0), (2, 1024)) / 32
    delta = lora.init(jax.random.key(1), base, {"w": lora.LoRA(2, init="orthogonal")}, fn, x)
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(fn)
    loss = lambda train, base: jnp.sum(adapted(base, lora.join(train, frozen), x) ** 2)  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss))
    ours, plain = compiled(train, base), compiled(train, lora.dequantize(base))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        assert jnp.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * float(jnp.abs(other).max()))
    residuals = jax.eval_shape(lambda train: jax.vjp(lambda train: loss(train, base), train)[1], train)
    assert not [a for a in jax.tree.leaves(residuals) if jnp.issubdtype(a.dtype, jnp.floating) and a.size >= 3 * 1024]
    assert lora.explain(fn, base, delta, x).factored
    assert lora.summary(base, delta).formats == {name: (1, BITS[name])}
