"""GPT-2: parity with transformers, round trips, dropout, adapters, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import checkpoint, gpt2
from experiments.models.options import Options
from tests.experiments.decoders import FIXTURES, expected, load, names

TOLERANCE = 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_logits_are_those_of_transformers(scan):
    want, model = expected("gpt2"), load("gpt2", Options(scan=scan))
    assert np.abs(model.jitted(model.base, want["tokens"]) - want["logits"]).max() <= TOLERANCE
    for side in ("left", "right"):
        mask = want[f"mask_{side}"].astype(bool)
        logits = model.jitted(model.base, want[f"prompts_{side}"], mask)
        assert np.abs(logits - want[f"logits_{side}"])[mask].max() <= TOLERANCE
        cache = model.model.cache(len(mask), 9)
        _, cache = model.jitted(model.base, want[f"prompts_{side}"][:, :5], mask[:, :5], cache=cache)
        logits, _ = model.jitted(model.base, want[f"prompts_{side}"][:, 5:], mask[:, 5:], cache=cache)
        assert np.abs(logits - want[f"logits_{side}"][:, 5:])[mask[:, 5:]].max() <= TOLERANCE


@pytest.mark.parametrize("scan", [False, True])
def test_checkpoints_make_the_round_trip_bit_by_bit(scan, tmp_path):
    model = gpt2.load(FIXTURES / "gpt2", Options(scan=scan), dtype=None)
    table, config = names("gpt2")
    checkpoint.save(tmp_path / "saved", lora.nnx.functional(model)[1], table, config)
    stored, written = (
        load_file(directory / "model.safetensors") for directory in (FIXTURES / "gpt2", tmp_path / "saved")
    )
    assert stored.keys() == written.keys()
    for tensor, array in stored.items():
        assert array.dtype == written[tensor].dtype and array.tobytes() == written[tensor].tobytes(), tensor


def test_old_checkpoints_of_the_bare_model_load(tmp_path):
    tensors = load_file(FIXTURES / "gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    old |= {f"h.{layer}.attn.bias": np.ones((1, 1, 32, 32), np.float32) for layer in range(2)}
    old |= {"h.0.attn.masked_bias": np.array(-1e4, np.float32), "lm_head.weight": old["wte.weight"]}
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / "gpt2" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, lora.nnx.functional(gpt2.load(tmp_path))[1], load("gpt2").base)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_is_on_in_training_only(getkey, scan):
    model = gpt2.load(FIXTURES / "gpt2", Options(scan=scan), dropout=0.5)
    apply, base = lora.nnx.functional(model)
    tokens, key = expected("gpt2")["tokens"], getkey()
    first, again, other = (apply(base, tokens, rngs=k) for k in (key, key, getkey()))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_allclose(apply(base, tokens), expected("gpt2")["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("options", [Options(), Options(scan=True, remat="dots"), Options(dtype=jnp.bfloat16)])
def test_adapters_stay_factored(getkey, options):
    model = load("gpt2", options)
    tokens = expected("gpt2")["tokens"]
    # query and value of the fused kernel; the embedding, which is the head too
    spec = {r"qkv/kernel": lora.LoRA(2, blocks=3), r"kernel|token/embedding": lora.LoRA(2)}
    delta = lora.init(getkey(), model.base, spec, model.apply, tokens)
    explained = lora.explain(model.apply, model.base, delta, tokens)
    assert explained.factored and "merged" not in str(explained)
    assert len(explained["token/embedding"]) == 2
    adapted = jax.jit(lora.adapt(model.apply))(model.base, delta, tokens)
    tolerance = TOLERANCE if options.dtype == jnp.float32 else 0.3
    np.testing.assert_allclose(adapted.astype(jnp.float32), expected("gpt2")["logits"], atol=tolerance)


def test_later_tokens_change_no_earlier_logits():
    model, tokens = load("gpt2"), jnp.asarray(expected("gpt2")["tokens"])
    changed = tokens.at[:, 7].set(3)
    difference = np.abs(model.jitted(model.base, tokens) - model.jitted(model.base, changed)).max(axis=(0, 2))
    assert np.all(difference[:7] == 0) and np.all(difference[7:] > 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "model_type is 'gptj', supported is 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, supported is True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_head": 3}, "n_embd 16 is not a multiple of n_head 3"),
        ({"n_layer": None}, "n_layer is missing"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        gpt2.Gpt2Config.from_json(names("gpt2")[1] | change)


def test_more_tokens_than_positions():
    model = load("gpt2")
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        model.apply(model.base, np.zeros((1, 33), np.int32))
