"""Which leaves quantize() takes, and what it says of the others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from lora_jax import paths
from lora_jax.leaves import is_quantized
from lora_jax.quantization import Plan, Quantized


def model(base, tokens):
    x = base["embedding"][tokens] * base["norm"]["scale"][None, None]
    h = x @ base["mlp"]["up"]["kernel"] + base["mlp"]["up"]["bias"][None, None]
    x = x + jnp.tanh(h) @ base["mlp"]["down"]["kernel"]
    return x @ base["lm_head"]["kernel"]


TOKENS = jnp.asarray([[0, 3, 5]])


@pytest.fixture
def base(getkey):
    normal = lambda *shape: jax.random.normal(getkey(), shape)  # noqa: E731
    return {
        "embedding": normal(7, 16),
        "norm": {"scale": jnp.ones(16)},
        "mlp": {"up": {"kernel": normal(16, 32), "bias": normal(32)}, "down": {"kernel": normal(32, 16)}},
        "lm_head": {"kernel": normal(16, 7)},
        "unused": normal(4, 4),
    }


def kinds(tree):
    flat = paths.flatten(tree)
    return {path: leaf.format for path, leaf in zip(flat.paths, flat.leaves) if is_quantized(leaf)}


FORM = lora.NF4(block=8)


def test_linear_layers_are_quantized_and_norms_biases_embeddings_and_the_head_stay(base):
    quantized = lora.quantize(base, {"": FORM}, model, TOKENS)
    assert kinds(quantized) == {"mlp/up/kernel": FORM, "mlp/down/kernel": FORM}
    for path in ("embedding", "unused"):
        assert quantized[path] is base[path]
    out = lora.adapt(model)(quantized, {}, TOKENS)
    np.testing.assert_allclose(out, model(lora.dequantize(quantized), TOKENS), rtol=1e-6, atol=1e-5)


def test_the_first_match_wins_and_none_leaves_a_match_alone(base):
    quantized = lora.quantize(base, {"down": None, "mlp": lora.Int8(block=8)}, model, TOKENS)
    assert kinds(quantized) == {"mlp/up/kernel": lora.Int8(block=8)}


def test_embeddings_and_heads_are_quantized_where_a_rule_is_for_them(base):
    quantized = lora.quantize(base, {"embedding": FORM, "head": lora.Int8(8), "": lora.FP4(8)}, model, TOKENS)
    assert kinds(quantized) == {
        "embedding": FORM,
        "lm_head/kernel": lora.Int8(8),
        "mlp/up/kernel": lora.FP4(8),
        "mlp/down/kernel": lora.FP4(8),
    }
    # A table's blocks run along its rows, which are looked up by their codes.
    assert quantized["embedding"].codes.shape == (7, 8)


def test_without_a_function_formats_say_what_axes_are(base):
    quantized = lora.quantize(base, {"up/kernel": lora.NF4(8, axes=("in", "out"))})
    assert kinds(quantized) == {"mlp/up/kernel": FORM}
    with pytest.raises(ValueError, match=r"'mlp/up/kernel': .*pass a function to trace, or axes= to the format"):
        lora.quantize(base, {"up/kernel": FORM})
    with pytest.raises(ValueError, match=r"'mlp/up/bias': axes=\('in', 'out'\) gives 2 roles"):
        lora.quantize(base, {"up": lora.NF4(8, axes=("in", "out"))})


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"mpl": FORM}, r"'mpl' matches no path of the base; nearest: 'mlp"),
        ({"mlp": FORM, "up": FORM}, "'up' is fully shadowed"),
        ({"norm": FORM}, "'norm' matches nothing that can be quantized: 'norm/scale' is neither contracted nor"),
        ({"unused": FORM}, "'unused' matches nothing that can be quantized: 'unused' is not used by the function"),
        ({"up/b": lora.NF4(8, axes=("out",))}, r"no axis for blocks: its roles are \('out',\)"),
        ({"(": FORM}, "not a regular expression"),
    ],
)
def test_rules_that_do_nothing_are_errors(base, rules, message):
    with pytest.raises(ValueError, match=message):
        lora.quantize(base, rules, model, TOKENS)


def test_rules_of_the_wrong_kind_are_errors(base):
    with pytest.raises(TypeError, match=r"rule 'mlp' takes a format.*; got the class NF4: write NF4\(\)"):
        lora.quantize(base, {"mlp": lora.NF4}, model, TOKENS)
    with pytest.raises(TypeError, match="Expected rules as a dict"):
        lora.quantize(base, [("mlp", FORM)], model, TOKENS)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_nan_and_inf_are_refused_by_name(base, value):
    base["mlp"]["up"]["kernel"] = base["mlp"]["up"]["kernel"].at[3, 4].set(value)
    with pytest.raises(ValueError, match="'mlp/up/kernel' contains NaN, Inf"):
        lora.quantize(base, {"": FORM}, model, TOKENS)


def test_quantized_leaves_are_not_quantized_again(base):
    quantized = lora.quantize(base, {"": FORM}, model, TOKENS)
    with pytest.raises(ValueError, match="is quantized already"):
        lora.quantize(quantized, {"mlp": FORM}, model, TOKENS)


def test_other_leaves_and_dtypes_come_back_from_dequantize(base):
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    again = lora.dequantize(lora.quantize(base, {"": FORM}, model, TOKENS))
    assert jax.tree.structure(again) == jax.tree.structure(base)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(jnp.bfloat16)}
    assert again["embedding"] is base["embedding"]


def test_a_plan_is_made_of_shapes_and_used_as_weights_come(base):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base)
    plan = Plan.of(shapes, {"": FORM}, model, TOKENS)
    quantized = plan("mlp/up/kernel", base["mlp"]["up"]["kernel"])
    whole = lora.quantize(base, {"": FORM}, model, TOKENS)["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(quantized.codes, whole.codes)
    assert plan("embedding", base["embedding"]) is base["embedding"]
    for shape in ((2, 16, 32), (16, 33)):
        with pytest.raises(ValueError, match=r"'mlp/up/kernel' has shape .*; the plan is for shape \(16, 32\)"):
            plan("mlp/up/kernel", jnp.ones(shape))
    with pytest.raises(ValueError, match="The plan has no path 'mlp/upp/kernel'; nearest: 'mlp/up/kernel'"):
        plan("mlp/upp/kernel", jnp.ones((16, 32)))


def test_inside_jit_leaves_are_made_too(base):
    quantized = jax.jit(lambda base: lora.quantize(base, {"": FORM}, model, TOKENS))(base)
    whole = lora.quantize(base, {"": FORM}, model, TOKENS)
    assert jax.tree.structure(quantized) == jax.tree.structure(whole)
    np.testing.assert_array_equal(quantized["mlp"]["down"]["kernel"].codes, whole["mlp"]["down"]["kernel"].codes)


def test_boxes_keep_their_place(getkey):
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    quantized = lora.quantize(state, {"kernel": lora.NF4(8, axes=("in", "out"))})
    leaf = quantized["kernel"].get_value()
    assert isinstance(leaf, Quantized) and leaf.shape == (16, 8)
    assert paths.flatten(quantized).paths == paths.flatten(state).paths


def test_the_summary_counts_what_is_held(base):
    quantized = lora.quantize(base, {"": FORM}, model, TOKENS)
    delta = lora.init(jax.random.key(0), quantized, {"mlp/.*kernel": lora.LoRA(2)}, model, TOKENS)
    figures = lora.summary(quantized, delta)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert figures.base_bytes == held < lora.summary(base, delta).base_bytes
    assert figures.base_parameters == lora.summary(base, delta).base_parameters
    assert figures.full_bytes == lora.summary(base, delta).full_bytes
    assert figures.float_bytes == lora.summary(base, delta).base_bytes
    leaves = [quantized["mlp"][name]["kernel"] for name in ("up", "down")]
    bits = 8 * sum(leaf.nbytes for leaf in leaves) / sum(leaf.size for leaf in leaves)
    assert f"quantized weights     2 in NF4, {bits:.3f} bits per parameter" in str(figures)
    assert "quantized" not in str(lora.summary(base, delta))
