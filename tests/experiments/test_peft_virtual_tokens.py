"""PEFT's prefixes and prompts give its logits and continuations, and are written as PEFT writes them."""

import doctest
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from experiments import generation
from experiments.baselines import peft_virtual_tokens, prefix_layer_tuning, prefix_tuning, prompt_tuning
from experiments.errors import UserError
from experiments.models import heads
from experiments.models.options import Options
from tests.experiments import encoders
from tests.experiments.decoders import FIXTURES, expected, load, names

ADAPTERS = FIXTURES.parent / "virtual_tokens"
METHODS = {"prefix": prefix_tuning, "prompt": prompt_tuning}


def stored(name):
    with np.load(ADAPTERS / name / "expected.npz") as file:
        return dict(file)


CASES = {"llama_prefix": False, "llama_prompt": True, "gpt2_prefix": True, "gpt2_prompt": False}


@pytest.mark.parametrize(("name", "scan"), CASES.items(), ids=CASES)
def test_decoders_compute_what_peft_does(name, scan):
    base_name, method = name.split("_")
    model, want = load(base_name, Options(scan=scan)), stored(name)
    table = names(base_name)[0]
    params = peft_virtual_tokens.load(ADAPTERS / name, model.base, table, model.model.shape)
    apply = METHODS[method].adapt(model.apply)
    inputs, step = expected(base_name), generation.make_step(apply)
    for side in ("left", "right"):
        prompts, mask = jnp.asarray(inputs[f"prompts_{side}"]), jnp.asarray(inputs[f"mask_{side}"].astype(bool))
        logits = jax.jit(apply)(params, prompts, mask)
        for row in range(len(prompts)):
            wanted = want["logits"][row][: int(mask[row].sum())]
            np.testing.assert_allclose(logits[row][mask[row]], wanted, atol=1e-5 * np.abs(want["logits"]).max())
        cache = model.model.cache(3, prompts.shape[1] + want["greedy"].shape[1])
        texts = generation.greedy(step, params, prompts, mask, cache=cache, new_tokens=want["greedy"].shape[1])
        np.testing.assert_array_equal(texts, want["greedy"])


def test_a_classifier_computes_what_peft_does():
    model = encoders.load("bert")
    apply_fn, base = lora.nnx.functional(model)
    table = heads.names(model.encoder.config)
    params = peft_virtual_tokens.load(ADAPTERS / "bert_prompt", base, table, model.encoder.shape)
    assert np.abs(params["classifier"]["kernel"] - base["classifier"]["kernel"]).max() > 0.1
    logits = prompt_tuning.adapt(apply_fn)(params, *encoders.fixture("bert").inputs)
    np.testing.assert_allclose(logits, stored("bert_prompt")["logits"], atol=1e-5)


@pytest.mark.parametrize("name", ["llama_prefix", "gpt2_prompt", "bert_prompt"])
def test_a_saved_adapter_is_the_file_of_peft(name, tmp_path):
    base_name, method = name.split("_")
    if base_name == "bert":
        model = encoders.load("bert")
        shape, table, base = model.encoder.shape, heads.names(model.encoder.config), lora.nnx.functional(model)[1]
    else:
        model = load(base_name)
        shape, table, base = model.model.shape, names(base_name)[0], model.base
    params = peft_virtual_tokens.load(ADAPTERS / name, base, table, shape)
    spec = {f"^{method}": lora.Full()} | ({"^classifier/": lora.Full()} if base_name == "bert" else {})
    delta = lora.init(jax.random.key(0), params, spec)
    peft_virtual_tokens.save(tmp_path / "new", params, delta, table, shape, base_model=base_name)
    got, want = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "new", ADAPTERS / name))
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == want[key].tobytes() and got[key].shape == want[key].shape for key in want)
    config, expected_config = (
        json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "new", ADAPTERS / name)
    )
    expected_config["modules_to_save"] = sorted(set(expected_config["modules_to_save"] or ())) or None
    ignored = {"num_attention_heads"} if method == "prompt" else set()  # PEFT does not read it
    assert all(config[key] == expected_config[key] for key in config.keys() - ignored)
    peft_virtual_tokens.save(tmp_path / "new", params, delta, table, shape)  # replaces it
    (tmp_path / "new" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"new contains entries .*notes\.txt"):
        peft_virtual_tokens.save(tmp_path / "new", params, delta, table, shape)


def test_a_network_is_folded_when_it_is_saved(getkey, tmp_path):
    model, table = load("gpt2"), names("gpt2")[0]
    base = model.base | {"prefix": prefix_tuning.init(getkey(), model.model.shape, 3, hidden=5)}
    delta = lora.init(getkey(), base, {"^prefix/": lora.Full()})
    peft_virtual_tokens.save(tmp_path / "new", base, delta, table, model.model.shape)
    params = peft_virtual_tokens.load(tmp_path / "new", model.base, table, model.model.shape)
    folded = prefix_tuning.fold(base["prefix"])
    jax.tree.map(np.testing.assert_array_equal, params["prefix"], folded)


def test_errors(getkey, tmp_path):
    model, table = load("llama"), names("llama")[0]
    shape = model.model.shape

    def message(directory, *, loaded=model):
        with pytest.raises(UserError) as error:
            peft_virtual_tokens.load(directory, loaded.base, table, loaded.model.shape)
        return str(error.value)

    assert "expected [tokens, 64] (2 · 2 · 4 · 4)" in message(ADAPTERS / "llama_prefix", loaded=load("gpt2"))
    assert "adapter_config.json: no such file" in message(tmp_path)
    shutil.copytree(ADAPTERS / "llama_prompt", tmp_path / "copy")
    file, config = tmp_path / "copy" / "adapter_model.safetensors", tmp_path / "copy" / "adapter_config.json"
    tensors = load_file(file)
    save_file(tensors | {"base_model.other.weight": np.ones(2, np.float32)}, file)
    assert "base_model.other.weight belong to no leaf" in message(tmp_path / "copy")
    save_file({"other": np.ones(2, np.float32)}, file)
    assert "has no tensor 'prompt_embeddings'" in message(tmp_path / "copy")
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_transformer_submodules": 2}))
    assert "an encoder and a decoder" in message(tmp_path / "copy")
    config.write_text(json.dumps(content | {"peft_type": "LORA"}))
    assert "peft_type is 'LORA', expected 'PREFIX_TUNING' or 'PROMPT_TUNING'; lora_jax.peft.load" in message(
        tmp_path / "copy"
    )
    base = model.base | {"prompt": prompt_tuning.init(getkey(), model.base["token"]["embedding"], 2)}
    axes = lora.LoRA(2, axes=("in", "out"))
    delta = lora.init(getkey(), base, {"^prompt$": lora.Full(), "layers/0/.*query/kernel": axes})
    with pytest.raises(UserError, match="query/kernel: PEFT's files of virtual tokens hold no LoRA"):
        peft_virtual_tokens.save(tmp_path / "new", base, delta, table, shape)
    base = model.base | {"layer_inputs": prefix_layer_tuning.init(getkey(), shape, 2)}
    with pytest.raises(UserError, match="PEFT has no method that trains the inputs of layers"):
        peft_virtual_tokens.save(tmp_path / "new", base, {}, table, shape)


def test_the_example(lenient):
    results = doctest.testmod(peft_virtual_tokens)
    assert results.attempted and not results.failed
