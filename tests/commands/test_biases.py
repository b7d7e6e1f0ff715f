"""Biases on B of layers without a bias: a Llama of transformers, on which PEFT trained `lora_bias`.

`fixtures/transformers/make_adapters.py` says what the fixtures are.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from experiments.models.options import Options
from lora_jax.__main__ import main
from lora_jax.commands.biases import split_biases
from tests.peft.test_ties import FIXTURES, close, program, tokens

BASE, ADAPTER = FIXTURES / "models" / "llama", FIXTURES / "adapters" / "biased"


def edited(tmp_path, change=None, config=None):
    """The adapter and the base with changes of the adapter's tensors and of the base's config."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(ADAPTER, adapter)
    shutil.copytree(BASE, base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: change(name, x) if change else x for name, x in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    content = json.loads((base / "config.json").read_text()) | (config or {})
    (base / "config.json").write_text(json.dumps(content))
    return str(base), str(adapter)


@pytest.mark.parametrize("how", [{}, {"options": Options(scan=True)}], ids=["layers", "stacked"])
def test_applied_unmerged(how):
    fn, params, names = program(BASE, **how)
    delta = lora.peft.load(ADAPTER, params, names)
    assert lora.explain(fn, params, delta, tokens(BASE)).factored
    close(jax.jit(lora.adapt(fn))(params, delta, tokens(BASE)), ADAPTER)
    with pytest.raises(ValueError, match="no merged weight holds"):
        lora.merge(params, delta)


@pytest.mark.parametrize("how", [{}, {"options": Options(scan=True)}], ids=["layers", "stacked"])
def test_written_again(how, tmp_path):
    _, params, names = program(BASE, **how)
    lora.peft.save(tmp_path, lora.peft.load(ADAPTER, params, names), names)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (ADAPTER, tmp_path))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"] is True


def test_modules_without_a_bias_are_written_with_zeros(tmp_path):
    """PEFT has `lora_bias` on all modules or on none."""
    _, params, names = program(BASE)
    delta = lora.peft.load(ADAPTER, params, names)
    _, *others = delta
    delta |= {path: dataclasses.replace(delta[path], bias=None) for path in others}
    lora.peft.save(tmp_path, delta, names)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    biases = {name: value.any() for name, value in stored.items() if name.endswith("lora_B.bias")}
    assert len(biases) == 14 and sum(biases.values()) == 1
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path, params, names), delta)


def test_merged_into_a_model_that_can_have_biases(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(BASE), str(ADAPTER), str(out)]) == 0
    assert "28 of 34 tensors changed\nadded: 14 bias tensors, " in (output := capsys.readouterr().out)
    assert "with attention_bias and mlp_bias true" in output
    fn, params, _ = program(out)
    close(fn(params, tokens(BASE)), ADAPTER)


def test_a_flag_is_for_all_layers(tmp_path, capsys):
    """Biases of zeros where the adapter has none; the index of a sharded base lists them."""

    def change(name, value):
        return value if "layers.1.self_attn.v_proj" in name or not name.endswith("lora_B.bias") else 0 * value

    base, adapter = edited(tmp_path, change)
    tensors = load_file(pathlib.Path(base) / "model.safetensors")
    (pathlib.Path(base) / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: x for name, x in tensors.items() if where[name] == file}, pathlib.Path(base) / file)
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (pathlib.Path(base) / "model.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    assert main(["merge", base, adapter, str(out)]) == 0
    assert (
        "added: 8 bias tensors, zeros for layers without one in the adapter, with attention_bias true"
        in capsys.readouterr().out
    )
    config = json.loads((out / "config.json").read_text())
    assert config["attention_bias"] is True and not config["mlp_bias"]
    written = json.loads((out / "model.safetensors.index.json").read_text())
    biases = {name for name in written["weight_map"] if name.endswith(".bias")}
    assert len(biases) == 8 and written["metadata"]["total_size"] == size + 4 * 2 * (8 + 4 + 4 + 8)
    stored = {file: load_file(out / file) for file in set(written["weight_map"].values())}
    nonzero = [name for name in biases if stored[written["weight_map"][name]][name].any()]
    assert nonzero == ["model.layers.1.self_attn.v_proj.bias"]
    fn, params, names = program(BASE)
    expected = lora.adapt(fn)(params, lora.peft.load(adapter, params, names), tokens(BASE))
    fn, params, _ = program(out)
    np.testing.assert_allclose(fn(params, tokens(BASE)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"model_type": "mistral"},
            r"layers.0.mlp.down_proj (14 such modules): the adapter has a bias on B (lora_bias)",
        ),
        ({"model_type": "qwen3"}, "layers.0.mlp.down_proj (6 such modules)"),
    ],
)
def test_a_model_that_cannot(config, message, tmp_path, capsys):
    base, adapter = edited(tmp_path, config=config)
    assert main(["merge", base, adapter, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "use the adapter unmerged" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_untied(getkey):
    head = lora.init(getkey(), {"lm_head/weight": jnp.ones((16, 8))}, {".*": lora.LoRA(2, axes=("out", "in"))})
    delta = {path: dataclasses.replace(node, bias=jnp.ones(16)) for path, node in head.items()}
    tensors = {"model.embed_tokens.weight": (16, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)}
    with pytest.raises(ValueError, match=r"^lm_head: the adapter has a bias on B .* type 'llama' cannot"):
        split_biases(delta, tensors, {"model_type": "llama"})


@pytest.mark.parametrize("target, reader", [("vllm", "vLLM"), ("gguf", "llama.cpp"), ("mlx", "mlx-lm")])
def test_readers_without_biases(target, reader, tmp_path, capsys):
    args = ["convert", ADAPTER, tmp_path / "out", "--target", target, "--base", BASE]
    assert main([*map(str, args)]) == 2
    assert f"model.layers.0.self_attn.q_proj: {reader} has no bias on B" in capsys.readouterr().err


def test_converted_for_peft(tmp_path):
    args = ["convert", ADAPTER, tmp_path / "out", "--target", "peft", "--base", BASE]
    assert main([*map(str, args)]) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (ADAPTER, tmp_path / "out"))
    assert before.keys() == after.keys() and all((after[name] == before[name]).all() for name in before)
