"""Tables that an encoder and a decoder share: what PEFT's model does with an adapter of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.__main__ import main

MODELS = {
    "t5": ("", "T5ForConditionalGeneration", "SelfAttention.q"),
    "bart": ("model.", "BartForConditionalGeneration", "q_proj"),
    "marian": ("model.", "MarianMTModel", "q_proj"),
}
A, B = np.full((2, 6), 0.5, np.float32), np.full((4, 2), 0.25, np.float32)


def written(directory, config, file, tensors):
    directory.mkdir()
    (directory / config).write_text(json.dumps(tensors.pop("config")))
    save_file(tensors, directory / file)
    return str(directory)


@pytest.fixture
def base(tmp_path, model):
    prefix, architecture, query = MODELS[model]
    names = [f"{prefix}encoder.layers.0.{query}.weight", f"{prefix}decoder.layers.0.{query}.weight"]
    tensors = {name: np.full((4, 4), 0.1, np.float32) for name in names}
    tensors |= {f"{prefix}shared.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}
    config = {"model_type": model, "architectures": [architecture], "vocab_size": 6}
    return written(tmp_path / "base", "config.json", "model.safetensors", tensors | {"config": config})


def adapter_of(tmp_path, model, part, settings=None, **tensors):
    """An adapter of the queries, and of a module."""
    prefix, _, query = MODELS[model]
    module = "lm_head" if part == "lm_head" else f"{prefix}shared"
    values = {f"base_model.model.{module}.{name}": value for name, value in tensors.items()}
    for half in ("encoder", "decoder"):
        name = f"base_model.model.{prefix}{half}.layers.0.{query}"
        values |= {f"{name}.lora_A.weight": np.ones((2, 4), np.float32), f"{name}.lora_B.weight": B}
    targets = [query.rpartition(".")[2], *([] if settings else [part])]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets} | (settings or {})
    name = tmp_path / "adapter"
    return written(name, "adapter_config.json", "adapter_model.safetensors", values | {"config": config})


def forms(part):
    if part == "lm_head":
        factors = {"lora_A.weight": np.ones((2, 4), np.float32), "lora_B.weight": A.T.copy()}
    else:
        factors = {"lora_embedding_A": A, "lora_embedding_B": B}
    return {"factors": (None, factors), "saved": ({"modules_to_save": [part]}, {"weight": np.ones((6, 4), np.float32)})}


@pytest.mark.parametrize("form", ["factors", "saved"])
@pytest.mark.parametrize("part", ["shared", "lm_head"])
@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_module_that_is_wrapped_alone_is_refused_by_name(base, model, part, form, tmp_path, capsys):
    settings, tensors = forms(part)[form]
    adapter, out = adapter_of(tmp_path, model, part, settings, **tensors), tmp_path / "out"
    assert main(["merge", base, adapter, str(out)]) == 2 and not out.exists()
    error = capsys.readouterr().err
    module = part if part == "lm_head" else f"{MODELS[model][0]}shared"
    assert f"--ignore {module} " in error and ("no effect" in error or "encoder" in error)
    assert main(["merge", base, adapter, str(out), "--ignore", module]) == 0, capsys.readouterr().err
    before, after = load_file(f"{base}/model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if (before[name] != after[name]).any()} == set(before) - {
        f"{MODELS[model][0]}shared.weight"
    }
    assert "tie_word_embeddings" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("model", ["t5", "bart", "marian"])
def test_rows_are_shared_but_not_by_marian(base, model, tmp_path, capsys):
    settings = {"trainable_token_indices": {"shared": [1, 5]}}
    rows = {"token_adapter.trainable_tokens_delta": np.full((2, 4), 7, np.float32)}
    adapter, out = adapter_of(tmp_path, model, "shared", settings, **rows), tmp_path / "out"
    status = main(["merge", base, adapter, str(out)])
    if model == "marian":
        assert status == 2 and "--ignore model.shared passes" in capsys.readouterr().err
    else:
        assert status == 0
        table = load_file(out / "model.safetensors")[f"{MODELS[model][0]}shared.weight"]
        assert (table[[1, 5]] == 7).all() and (table[0] == np.arange(4)).all()


@pytest.mark.parametrize("model", ["t5"])
def test_load_refuses_it_too(base, model, tmp_path):
    settings, tensors = forms("shared")["saved"]
    adapter = adapter_of(tmp_path, model, "shared", settings, **tensors)
    leaves = {name.replace(".", "/"): value for name, value in load_file(f"{base}/model.safetensors").items()}
    names = lora.peft.Names(tuple(lora.peft.Weight(path, path.replace("/", ".")) for path in leaves))
    with pytest.raises(ValueError, match=r"ignore=\('shared',\) passes it over"):
        lora.peft.load(adapter, leaves, names)


def test_the_head_is_named_as_its_model_does():
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    assert lora.peft.tied_head("model.decoder.embed_tokens.weight", config) == "proj_out.weight"
    config = {"model_type": "biogpt", "architectures": ["BioGptForCausalLM"]}
    assert lora.peft.tied_head("biogpt.embed_tokens.weight", config) == "output_projection.weight"
