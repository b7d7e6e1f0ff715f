"""Tables that an encoder and a decoder share: adapters that have no effect in PEFT are refused."""

import json
import re

import jax
import jax.numpy as jnp
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


@pytest.mark.parametrize("recipe", [lora.LoRA(2, axes=("in", "out")), lora.DoRA(2, axes=("in", "out")), lora.Full()])
@pytest.mark.parametrize("target", ["peft", "vllm"])
@pytest.mark.parametrize("table", ["shared.weight", "model.shared.weight", "model.embed_tokens.weight"])
def test_save_refuses_it_too(recipe, target, table, tmp_path):
    """By the names alone: a table beside an encoder and a decoder, for which PyTorch's model has other modules."""
    prefix = "model." if table.startswith("model.") else ""
    rows = [lora.peft.Weight("table", table, module="embedding")]
    rows += [
        lora.peft.Weight(
            f"{half}/{{layer}}/query/kernel", f"{prefix}{half}.layers.{{layer}}.q_proj.weight", "in out -> out in"
        )
        for half in ("encoder", "decoder")
    ]
    names = lora.peft.Names(tuple(rows))
    base = {"table": jnp.ones((6, 4)), "encoder": {"0": {"query": {"kernel": jnp.ones((4, 4))}}}}
    module = table.removesuffix(".weight")
    delta = lora.init(jax.random.key(0), base, {"query": lora.LoRA(2, axes=("in", "out")), "table": recipe})
    with pytest.raises(
        ValueError, match=rf"no effect in PEFT: {re.escape(module)} is wrapped, .* which have its weight"
    ):
        lora.peft.save(tmp_path / "out", delta, names, target=target)
    assert not (tmp_path / "out").exists()
    del delta["table"]
    lora.peft.save(tmp_path / "out", delta, names, target=target)


def test_save_writes_rows_of_it(tmp_path):
    names = lora.peft.Names((lora.peft.Weight("table", "shared.weight", module="embedding"),))
    base = {"table": jnp.ones((6, 4))}
    delta = lora.init(jax.random.key(0), base, {"table": lora.Rows((1, 5), axes=("in", "out"))})
    lora.peft.save(tmp_path / "out", delta, names)
    np.testing.assert_array_equal(lora.peft.load(tmp_path / "out", base, names)["table"].ids, [1, 5])


def test_the_head_is_named_as_its_model_does():
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    assert lora.peft.tied_head("model.decoder.embed_tokens.weight", config) == "proj_out.weight"
    config = {"model_type": "biogpt", "architectures": ["BioGptForCausalLM"]}
    assert lora.peft.tied_head("biogpt.embed_tokens.weight", config) == "output_projection.weight"


@pytest.fixture
def tokens_alone(tmp_path):
    """A tied model, and trainable tokens alone as PEFT 0.21.2 writes them: for each module of the weight."""
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    weights = {"model.embed_tokens.weight": table, "model.layers.0.q_proj.weight": table[:4]}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    base = written(tmp_path / "base", "config.json", "model.safetensors", weights | {"config": config})
    settings = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed_tokens"], "token_indices": [0, 5]}

    def adapter(name, head):
        keys = ("model.embed_tokens", "lm_head")
        rows = {f"base_model.model.{x}.trainable_tokens_delta": np.full((2, 4), v) for x, v in zip(keys, (7, head))}
        rows = {key: value.astype(np.float32) for key, value in rows.items()}
        return written(tmp_path / name, "adapter_config.json", "adapter_model.safetensors", rows | {"config": settings})

    return base, adapter


def test_trained_rows_of_each_module_of_a_tied_weight(tokens_alone, tmp_path, capsys):
    base, adapter_named = tokens_alone
    adapter, out, again = adapter_named("adapter", head=7), tmp_path / "out", tmp_path / "again"
    assert main(["inspect", adapter]) == 0
    assert main(["inspect", adapter, "--base", base]) == 0
    assert main(["merge", base, adapter, str(out)]) == 0
    merged = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in merged and (merged["model.embed_tokens.weight"][[0, 5]] == 7).all()
    assert main(["convert", adapter, str(again), "--target", "peft", "--base", base]) == 0
    assert (
        load_file(again / "adapter_model.safetensors").keys()
        == load_file(f"{adapter}/adapter_model.safetensors").keys()
    )
    assert json.loads((again / "adapter_config.json").read_text())["target_modules"] == ["model.embed_tokens"]
    leaves = {"embed": np.zeros((6, 4), np.float32)}
    for tied in ((), ("lm_head.weight",)):
        row = lora.peft.Weight("embed", "model.embed_tokens.weight", module="embedding", tied=tied)
        assert lora.peft.load(adapter, leaves, lora.peft.Names((row,)))["embed"].kind == "Rows"
    capsys.readouterr()
    differs = adapter_named("differs", head=8)
    for command in (["merge", base, differs, str(tmp_path / "x")], ["inspect", differs, "--base", base]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "base_model.model.lm_head.trainable_tokens_delta differ" in error and "token_adapter" not in error
    with pytest.raises(ValueError, match=r"lm_head\.trainable_tokens_delta differ"):
        lora.peft.load(differs, leaves, lora.peft.Names((row,)))


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_trained_rows_of_each_module_of_a_shared_table(base, model, tmp_path, capsys):
    prefix, out = MODELS[model][0], tmp_path / "out"
    settings = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["shared"], "token_indices": [1, 5]}
    modules = [f"{prefix}{x}" for x in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")] + ["lm_head"]
    rows = {f"base_model.model.{x}.trainable_tokens_delta": np.full((2, 4), 7, np.float32) for x in modules}
    name = tmp_path / "adapter"
    adapter = written(name, "adapter_config.json", "adapter_model.safetensors", rows | {"config": settings})
    assert main(["merge", base, adapter, str(out)]) == 0, capsys.readouterr().err
    merged = load_file(out / "model.safetensors")
    assert (merged[f"{prefix}shared.weight"][[1, 5]] == 7).all() and "lm_head.weight" not in merged
