"""The Llama family: parity with transformers, round trips, forms of computing, adapters, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import checkpoint, llama
from experiments.models.options import Options
from experiments.models.rope import Rope
from experiments.models.stored_weights import StoredWeights
from tests.experiments.decoders import FIXTURES, LLAMAS, expected, load, names

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_those_of_transformers(name):
    want, model = expected(name), load(name)
    assert np.abs(model.jitted(model.base, want["tokens"]) - want["logits"]).max() <= TOLERANCE
    for side in ("left", "right"):
        mask = want[f"mask_{side}"].astype(bool)
        logits = model.jitted(model.base, want[f"prompts_{side}"], mask)
        assert np.abs(logits - want[f"logits_{side}"])[mask].max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "side", "scan"),
    [("mistral", "left", False), ("mistral", "right", True), ("qwen2", "right", False), ("qwen2", "left", True)],
)
def test_a_cache_changes_no_logits(name, side, scan):
    want, model = expected(name), load(name, Options(scan=scan))
    mask, prompts = want[f"mask_{side}"].astype(bool), want[f"prompts_{side}"]
    cache, logits = model.model.cache(len(prompts), 12), []
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        part_logits, cache = model.jitted(model.base, prompts[:, part], mask[:, part], cache=cache)
        logits.append(part_logits)
    assert int(cache.used) == 9 and not cache.fresh
    assert np.abs(np.concatenate(logits, axis=1) - want[f"logits_{side}"])[mask].max() <= TOLERANCE
    last, _ = model.jitted(model.base, prompts, mask, cache=model.model.cache(len(prompts), 12), last=True)
    assert last.shape == (len(prompts), want["logits"].shape[-1])
    ends = mask[:, -1]  # elsewhere the last place is padding
    np.testing.assert_allclose(last[ends], want[f"logits_{side}"][ends, -1], atol=TOLERANCE)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("scan", [False, True])
def test_checkpoints_make_the_round_trip_bit_by_bit(name, scan, tmp_path):
    model = llama.load(FIXTURES / name, Options(scan=scan), dtype=None)
    table, config = names(name)
    checkpoint.save(tmp_path / "saved", lora.nnx.functional(model)[1], table, config)
    stored, written = (
        load_file(directory / "model.safetensors") for directory in (FIXTURES / name, tmp_path / "saved")
    )
    assert stored.keys() == written.keys()
    for tensor, array in stored.items():
        assert array.dtype == written[tensor].dtype and array.tobytes() == written[tensor].tobytes(), tensor
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config


# one window for all layers, several; every scan and remat
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mistral", Options(scan=True)),
        ("qwen2", Options(remat="full")),
        ("mistral", Options(remat="dots")),
        ("qwen2", Options(scan=True, remat="dots")),
        ("qwen2", Options(scan=True, remat="full")),
    ],
)
def test_scanned_and_rematerialized_layers_compute_the_same(name, options):
    want = expected(name)
    plain, model = load(name), load(name, options)

    def loss(model, base):
        return jnp.mean(model.apply(base, want["tokens"][:, :-1], labels_BL=want["tokens"][:, 1:]))

    value, grads = jax.jit(jax.value_and_grad(lambda base: loss(model, base)))(model.base)
    value_plain, grads_plain = jax.jit(jax.value_and_grad(lambda base: loss(plain, base)))(plain.base)
    np.testing.assert_allclose(value, value_plain, rtol=1e-6)
    if options.scan:
        layers = list(grads_plain["layers"].values())
        grads_plain = grads_plain | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, grads_plain)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_activations(scan):
    options = Options(scan=scan, dtype=jnp.bfloat16)
    model = llama.load(FIXTURES / "qwen3", options, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    apply, base = lora.nnx.functional(model)
    tokens, want = expected("qwen3")["tokens"], expected("qwen3")["logits"]
    logits = jax.jit(apply)(base, tokens)
    assert logits.dtype == jnp.bfloat16
    assert np.corrcoef(logits.astype(jnp.float32).ravel(), want.ravel())[0, 1] > 0.99
    _, cache = jax.jit(apply)(base, tokens, cache=model.cache(*tokens.shape))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype(jnp.bfloat16)}


def test_packed_texts_are_as_if_alone():
    want, model = expected("qwen2"), load("qwen2")
    first, second = want["tokens"][:1, :7], want["tokens"][1:2, :5]
    packed = np.concatenate([first, second], axis=1)
    segments = np.repeat(np.array([[1, 2]], np.int32), [7, 5], axis=1)
    logits = model.jitted(model.base, packed, segments)
    assert np.abs(logits[0, :7] - want["logits"][0, :7]).max() <= TOLERANCE
    assert np.abs(logits[0, 7:] - want["logits"][1, :5]).max() <= TOLERANCE


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_adapters_stay_factored(getkey, scan, remat):
    model = load("qwen2", Options(scan=scan, remat=remat))
    tokens = expected("qwen2")["tokens"]
    delta = lora.init(getkey(), model.base, {r"kernel|embedding": lora.LoRA(2)}, model.apply, tokens)
    assert len(delta) == (8 if scan else 1 + 3 * 7)
    explained = lora.explain(model.apply, model.base, delta, tokens)
    assert explained.factored and "merged" not in str(explained)
    adapted = jax.jit(lora.adapt(model.apply))(model.base, delta, tokens)
    np.testing.assert_allclose(adapted, expected("qwen2")["logits"], atol=TOLERANCE)


def test_weights_are_put_where_they_are_asked_for():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding(path, shape):
        split = path.endswith(("kernel", "embedding"))
        spec = [None] * len(shape)
        if split and shape[-1] % 2 == 0:
            spec[-1] = "model"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    for scan in (False, True):
        model = llama.load(FIXTURES / "llama", Options(scan=scan), sharding=sharding)
        apply, base = lora.nnx.functional(model)
        for path, leaf in jax.tree_util.tree_leaves_with_path(base):
            target = sharding("/".join(str(key.key) for key in path), leaf.shape)
            assert leaf.sharding.is_equivalent_to(target, leaf.ndim), path
        jax.tree.map(np.testing.assert_array_equal, base, load("llama", Options(scan=scan)).base)
    logits = jax.jit(apply)(base, expected("llama")["tokens"])
    assert np.abs(logits - expected("llama")["logits"]).max() <= TOLERANCE


def config(name, **changes):
    content = names(name)[1] | changes
    return {key: value for key, value in content.items() if value != "absent"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (config("llama", model_type="gemma"), "model_type is 'gemma', supported is 'llama' or 'mistral'"),
        (config("llama", hidden_act="gelu"), "hidden_act is 'gelu', supported is 'silu'"),
        (config("qwen2", attention_bias=True), "attention_bias is True"),
        (config("llama", vocab_size="absent"), "vocab_size is missing"),
        (config("llama", vocab_size="many"), "vocab_size is 'many'"),
        (config("llama", num_key_value_heads=3), "4 is not a multiple of num_key_value_heads 3"),
        (config("llama", head_dim=5), "head_dim 5 is odd"),
        (config("llama", rope_parameters={"rope_type": "longrope"}), "'longrope' .its frequencies depend"),
        (config("llama", rope_parameters={"rope_type": "spiral"}), "rope_type is 'spiral', supported is 'default'"),
        (config("llama", rope_parameters={"rope_type": "yarn"}), "yarn RoPE needs a number as factor"),
        (config("llama", rope_parameters={"full_attention": {}}), "one set for all layers"),
        (config("llama", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (config("qwen2", layer_types=["full_attention"]), "for each of 3 layers"),
        (config("qwen2", use_sliding_window=False, layer_types=["sliding_attention"] * 3), "with sliding_window None"),
    ],
)
def test_what_is_not_computed_is_refused(content, message):
    with pytest.raises(UserError, match=message):
        llama.LlamaConfig.from_json(content)


def test_windows_of_layers():
    def sliding(*args, **changes):
        return llama.LlamaConfig.from_json(config(*args, **changes)).sliding

    assert sliding("llama") == sliding("mistral", sliding_window=None) == (False, False)
    assert sliding("mistral") == (True, True)
    assert sliding("mistral", sliding_window="absent") == (True, True)  # transformers' default is a window
    assert sliding("qwen2", layer_types=None) == sliding("qwen2") == (False, True, True)
    assert sliding("qwen2", use_sliding_window="absent", layer_types=None) == (False, False, False)


def test_what_a_config_leaves_out():
    short = config("llama", head_dim="absent", num_key_value_heads="absent", rope_parameters="absent")
    shape = llama.LlamaConfig.from_json(short)
    assert (shape.head_dim, shape.num_key_value_heads) == (4, 4)
    np.testing.assert_allclose(shape.rope.frequencies, [1, 10_000**-0.5], rtol=1e-6)


# as transformers computes them from the same fields
@pytest.mark.parametrize("name", ["default", "linear", "llama3", "yarn", "yarn_mscale", "yarn_exact", "dynamic"])
def test_frequencies_are_those_of_transformers(name):
    content = json.loads((FIXTURES / "rope.json").read_text())[name]
    want, factor = content.pop("frequencies"), content.pop("factor")
    for fields in (
        content,
        {
            "max_position_embeddings": content["max_position_embeddings"],
            "rope_theta": content["rope_parameters"]["rope_theta"],
            "rope_scaling": {k: v for k, v in content["rope_parameters"].items() if k != "rope_theta"},
        },
    ):
        rope = Rope.from_json(fields, 2 * len(want))
        np.testing.assert_allclose(rope.frequencies, want, rtol=1e-5)
        assert rope.factor == pytest.approx(factor)


def test_dynamic_scaling_beyond_its_length_is_refused():
    content = config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0})
    model = llama.Llama(llama.LlamaConfig.from_json(content), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        model(jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        model.cache(1, 33)


def test_more_tokens_than_slots():
    model = load("llama")
    with pytest.raises(ValueError, match="5 tokens, 4 slots"):
        model.apply(model.base, np.zeros((1, 5), np.int32), cache=model.model.cache(1, 4))


RULES = {"layers/.*kernel": lora.NF4(block=8)}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_weights_are_quantized_as_they_are_read_a_layer_at_a_time(scan, monkeypatch):
    """As quantize() makes them of the whole model, with one layer's weight in floats at a time."""
    options, tokens = Options(scan=scan), jnp.zeros((1, 8), jnp.int32)
    apply, base = lora.nnx.functional(llama.load(FIXTURES / "llama", options))
    whole = lora.quantize(base, RULES, apply, tokens)
    sizes = []
    place_on_mesh = StoredWeights._device_array

    def counted(*args):
        leaf = place_on_mesh(*args)
        sizes.append(leaf.shape)
        return leaf

    monkeypatch.setattr(StoredWeights, "_device_array", counted)
    apply, read = lora.nnx.functional(llama.load(FIXTURES / "llama", options, rules=RULES))
    assert jax.tree.structure(read) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(one, other)
    assert sizes.count((1, 16, 24) if scan else (16, 24)) == 4  # gate and up of two layers
    logits = lora.adapt(apply)(read, {}, tokens)
    np.testing.assert_allclose(logits, apply(lora.dequantize(whole), tokens), atol=1e-5)


def test_weights_are_quantized_on_their_shardings():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def sharding(path, shape):
        spec = [None] * (len(shape) - 1) + ["x"] if path.endswith("up/kernel") else []
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    for scan in (False, True):
        options = Options(scan=scan)
        _, read = lora.nnx.functional(llama.load(FIXTURES / "llama", options, rules=RULES, sharding=sharding))
        _, usual = lora.nnx.functional(llama.load(FIXTURES / "llama", options, rules=RULES))
        for one, other in zip(jax.tree.leaves(read), jax.tree.leaves(usual)):
            np.testing.assert_array_equal(one, other)
        layers = read["layers"] if scan else read["layers"][0]
        assert layers["feed_forward"]["up"]["kernel"].codes.sharding.spec[-1] == "x"


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_four_bit_checkpoints_of_transformers_keep_their_codes(scan):
    want = np.load(FIXTURES / "llama_nf4" / "expected.npz")
    apply, base = lora.nnx.functional(llama.load(FIXTURES / "llama_nf4", Options(scan=scan)))
    layers = base["layers"]
    down = (layers if scan else layers[1])["feed_forward"]["down"]["kernel"]
    assert down.format == lora.NF4() and down.dtype == jnp.float32
    values = np.asarray(down.dequantize())[1] if scan else np.asarray(down.dequantize())
    np.testing.assert_allclose(values.T, want["down"], rtol=3e-7)  # a compiler may fuse a product and a sum
    assert np.abs(lora.adapt(apply)(base, {}, want["tokens"]) - want["logits"]).max() <= TOLERANCE


def test_four_bit_checkpoints_lie_on_their_shardings_and_are_compared_with_the_model(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

    def sharding(path, shape):
        spec = [None] * (len(shape) - 1) + ["x"] if path.endswith("up/kernel") else []
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    _, base = lora.nnx.functional(llama.load(FIXTURES / "llama_nf4", sharding=sharding))
    up = base["layers"][0]["feed_forward"]["up"]["kernel"]
    assert up.codes.sharding.spec[-1] == "x" and len(up.codes.sharding.device_set) == 2
    with pytest.raises(UserError, match="cannot be quantized, since it is quantized in the checkpoint"):
        llama.load(FIXTURES / "llama_nf4", rules={"layers/.*kernel": lora.Int8()})
    config = json.loads((FIXTURES / "llama_nf4" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    (tmp_path / "model.safetensors").symlink_to(FIXTURES / "llama_nf4" / "model.safetensors")
    with pytest.raises(UserError, match=r"feed_forward/.*kernel: shape \(.*128.*\) in the checkpoint, expected"):
        llama.load(tmp_path)
