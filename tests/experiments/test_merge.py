"""`merge`: an adapter and its base become a checkpoint in Hugging Face layout."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import command_line
from experiments.models import location
from experiments.pretrained.files import open_files
from lora_jax.__main__ import main
from tests.experiments.gguf_files import FILES


def write_adapter(directory, model, modules):
    """An adapter of PEFT, with random factors, of some modules of a base; returns the changes of their weights."""
    rng = np.random.default_rng(0)
    factors, changes = {}, {}
    with open_files(model).tensors() as tensors:
        for module in modules:
            out_size, in_size = tensors[f"{module}.weight"]
            a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, in_size), (out_size, 2)))
            factors[f"base_model.model.{module}.lora_A.weight"] = a
            factors[f"base_model.model.{module}.lora_B.weight"] = b
            changes[f"{module}.weight"] = 3 * b @ a
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(modules), "task_type": "CAUSAL_LM"}
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return changes


MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def test_equal_to_the_merge_of_files(tmp_path, capsys):
    base = location.find("tiny-llama")
    write_adapter(tmp_path / "adapter", base, MODULES)
    assert (
        command_line.main(
            ["merge", "--model", "tiny-llama", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
        )
        == 0
    )
    assert "tiny-llama with 3 weights changed by" in capsys.readouterr().out
    assert main(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "expected")]) == 0
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(merged[name], value, err_msg=name)
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((base / name).read_text())


def test_a_base_in_a_gguf_file(tmp_path):
    file = FILES / "llama.gguf"
    changes = write_adapter(tmp_path / "adapter", file, MODULES)
    out = tmp_path / "out"
    assert (
        command_line.main(
            [
                "merge",
                "--model",
                str(file),
                "--adapter",
                str(tmp_path / "adapter"),
                "--dtype",
                "float32",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    merged = load_file(out / "model.safetensors")
    with open_files(file).tensors() as tensors:
        before = {name: np.float32(tensors.read(name)) for name in tensors}
    assert merged.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_allclose(merged[name], value + changes.get(name, 0), rtol=1e-5, atol=1e-5, err_msg=name)
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--adapter: name the adapter to merge"),
        (("--adapter", "{path}/none"), "none"),
        (("--adapter", "{path}/adapter"), "no base model is recorded with it; name the one it adapts with --model"),
        (("--adapter", "{path}/adapter", "--model", "tiny-llama", "--out", "{path}"), "holds files already"),
        (("--adapter", "{path}/adapter", "--model", "tiny-gpt2"), "q_proj"),
    ],
)
def test_errors(tmp_path, capsys, arguments, message):
    write_adapter(tmp_path / "adapter", location.find("tiny-llama"), MODULES)
    assert command_line.main(["merge", *(text.format(path=tmp_path) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
