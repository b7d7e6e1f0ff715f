"""Tied embeddings of Llama and GPT-2: adapters that PEFT wrote, merged on the command line and loaded here.

`fixtures/transformers/make_adapters.py` says what the fixtures are.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from experiments.models import families
from lora_jax.__main__ import main

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "transformers"
TIED = [path.name for path in sorted((FIXTURES / "adapters").iterdir()) if path.name.startswith(("llama_", "gpt2_"))]
STAYS = ("both_saved_ensured", "_rows", "llama_embedding_saved_ensured", "llama_embedding_adapted_ensured")
"""Ends of the names of adapters that leave the head the embedding."""


def close(actual, directory):
    expected = load_file(directory / "adapted.safetensors")["adapted"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def model_of(case):
    return FIXTURES / "models" / case.partition("_")[0]


def program(directory, **how):
    """A model of a directory as a function, its parameters and its names."""
    family = families.get_family(json.loads((directory / "config.json").read_text()))
    model = family.load(directory, **how)
    return *lora.nnx.functional(model), family.names(model.config)


def tokens(directory):
    return jnp.asarray(load_file(directory / "io.safetensors")["x"], jnp.int32)


@pytest.mark.parametrize("case", TIED)
def test_merged(case, tmp_path, capsys):
    base, adapter, out = model_of(case), FIXTURES / "adapters" / case, tmp_path / "out"
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    printed = capsys.readouterr().out
    fn, params, _ = program(out)
    close(fn(params, tokens(base)), adapter)
    apart = not case.endswith(STAYS)
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == apart
    assert ("untied: " in printed) == apart
    assert (json.loads((out / "config.json").read_text()).get("tie_word_embeddings") is False) == apart


@pytest.mark.parametrize("case", TIED)
def test_loaded(case):
    """On the model as it is, where PEFT leaves it tied; otherwise that is refused, and the untied model takes it."""
    base, adapter = model_of(case), FIXTURES / "adapters" / case
    fn, params, names = program(base)
    if not case.endswith(STAYS):
        with pytest.raises(ValueError, match=r"tied: .*lm_head.weight are one leaf.*untied"):
            lora.peft.load(adapter, params, names)
        fn, params, names = program(base, untied=True)
    delta = lora.peft.load(adapter, params, names)
    close(jax.jit(lora.adapt(fn))(params, delta, tokens(base)), adapter)


@pytest.mark.parametrize("case", ["llama_embedding_adapted", "llama_both_adapted", "gpt2_rows_of_the_head"])
def test_written_again(case, tmp_path):
    """What PEFT reads stays the same, with the base or without."""
    base, adapter = model_of(case), FIXTURES / "adapters" / case
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--target", "peft", "--base", str(base)]) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    expected = {name: value for name, value in before.items() if "base_layer" not in name}
    assert expected.keys() == after.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("target, reader", [("mlx", "mlx-lm"), ("gguf", "llama.cpp")])
@pytest.mark.parametrize("case", ["llama_embedding_adapted", "llama_head_adapted"])
def test_readers_with_one_weight_for_both(target, reader, case, tmp_path, capsys):
    args = ["convert", FIXTURES / "adapters" / case, tmp_path / "out", "--target", target, "--base", model_of(case)]
    assert main([*map(str, args)]) == 2
    assert reader in (error := capsys.readouterr().err) and "one weight for model.embed_tokens.weight" in error


def test_a_tied_pair_for_each_reader(tmp_path):
    """mlx-lm applies an embedding's factors to the tied head; llama.cpp cannot; vLLM has factors of both."""
    case = "llama_embedding_adapted_ensured"
    _, params, names = program(model_of(case))
    delta = lora.peft.load(FIXTURES / "adapters" / case, params, names)
    lora.peft.save(tmp_path / "mlx", delta, names, target="mlx")
    assert not any("lm_head" in name for name in load_file(tmp_path / "mlx" / "adapters.safetensors"))
    assert "embed_tokens" in str(json.loads((tmp_path / "mlx" / "adapter_config.json").read_text()))
    lora.peft.save(tmp_path / "vllm", delta, names, target="vllm")
    assert any("lm_head" in name for name in load_file(tmp_path / "vllm" / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"llama\.cpp supports no factors of a head that is the embedding"):
        lora.peft.save(tmp_path / "gguf", delta, names, target="gguf")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_stored_head_that_differs_from_the_embedding(name, tmp_path):
    """The config says tied; transformers unties the two and uses the head."""
    directory = tmp_path / "model"
    shutil.copytree(FIXTURES / "models" / name, directory)
    tensors = load_file(directory / "model.safetensors")
    (table,) = [x for x in tensors if x.endswith(("embed_tokens.weight", "wte.weight"))]
    untied = tensors | {"lm_head.weight": 2 * tensors[table]}
    save_file(untied, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="lm_head.weight differs from the embedding"):
        fn, params, names = program(directory)
    base = load_file(directory / "io.safetensors")["base"]
    np.testing.assert_allclose(fn(params, tokens(directory)), 2 * base, rtol=1e-5, atol=1e-5)
    assert names.find("output/kernel", params["output"]["kernel"].shape)
    save_file(tensors | {"lm_head.weight": tensors[table]}, directory / "model.safetensors", metadata={"format": "pt"})
    fn, params, _ = program(directory)
    assert "output" not in params


@pytest.mark.parametrize("case, rows", [("llama_rows", True), ("llama_embedding_adapted", False)])
def test_a_head_that_is_stored_as_a_copy(case, rows, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model_of(case), base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter, out = FIXTURES / "adapters" / case, tmp_path / "out"
    assert main(["merge", str(base), str(adapter), str(out)]) == 0
    assert (json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True) == rows
    fn, params, _ = program(out)
    close(fn(params, tokens(base)), adapter)
