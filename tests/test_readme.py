"""The README's example runs, and its commands are the ones that exist."""

import pathlib
import re

import jax
import numpy as np

import lora_jax as lora
from lora_jax.__main__ import main

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run(lenient, tmp_path, monkeypatch):
    first, quantized, more_quantized, together, interchange = blocks("python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(first, str(README), "exec"), names)
    assert float(names["metrics"]["loss"]) > 0
    merged, base = names["merged"], names["base"]
    assert (np.asarray(merged["hidden"]["kernel"]) != np.asarray(base["hidden"]["kernel"])).any()
    exec(compile(quantized, str(README), "exec"), names)
    exec(compile(more_quantized, str(README), "exec"), names)
    assert repr(names["small"]["hidden"]["kernel"]).startswith("NF4[64, 128]")
    assert set(names["errors"]) == {"hidden/kernel"}
    exec(compile(together, str(README), "exec"), names)
    assert names["outputs"].shape == (8, 3) and len(names["deltas"]) == 3
    monkeypatch.chdir(tmp_path)
    exec(compile(interchange, str(README), "exec"), names)
    jax.tree.map(np.testing.assert_array_equal, names["again"], names["state"].delta)
    commands = [line.split("#")[0].split()[1:] for line in blocks("bash")[1].splitlines()]
    assert [command[0] for command in commands] == ["inspect", "merge", "convert", "diff"]
    checkpoint = {"net.hidden.weight": base["hidden"]["kernel"].T, "net.head.weight": base["head"]["kernel"].T}
    (tmp_path / "llama").mkdir()
    lora.peft.write_model(tmp_path / "llama", [(name, np.asarray(tensor)) for name, tensor in checkpoint.items()])
    assert main(commands[0]) == 0 and main(commands[1]) == 0
    # vLLM takes no head that is trained in full
    low_rank = {path: node for path, node in names["state"].delta.items() if node.kind == "LoRA"}
    lora.peft.save("my-adapter", low_rank, names["names"])
    assert main(commands[2]) == 0
    assert main(commands[3]) == 0  # one scale and one rank: nothing had to be folded


def test_ci_calls_the_test_command():
    command = blocks("bash")[0].splitlines()[1].split("#")[0].strip()
    assert command in (README.parent / ".ci" / "run").read_text()
