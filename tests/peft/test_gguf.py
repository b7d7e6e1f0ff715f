"""GGUF files of adapters: what llama.cpp's own converter writes, and back."""

import builtins
import dataclasses
import json
import pathlib
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.__main__ import main
from lora_jax.peft import LINEAR, Names, Weight

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "gguf"
FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "qwen3"]
PREFIX = "base_model.model."


@pytest.fixture
def run(capsys):
    def run(*args):
        assert main([str(arg) for arg in args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    def fails(*args):
        assert main([str(arg) for arg in args]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return fails


def convert(run, family, out, *options, adapter=None, base=None):
    adapter = adapter or FIXTURES / family / "adapter"
    run("convert", adapter, out, "--target", "gguf-file", "--base", base or FIXTURES / family / "base", *options)
    return gguf.GGUFReader(out)


def fields(reader):
    return {name: value.contents() for name, value in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader):
    return {tensor.name: (tensor.tensor_type, tensor.data.copy()) for tensor in reader.tensors}


def values(reader):
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def changes(reader):
    """ΔW of each weight as llama.cpp computes it: alpha over the rank of each B."""
    alpha, factors = fields(reader)["adapter.lora.alpha"], values(reader)
    names = [name.removesuffix(".lora_b") for name in factors if name.endswith(".lora_b")]
    pairs = {name: (factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]) for name in names}
    return {name: alpha / b.shape[-1] * (b @ (a.T if "token_embd" in name else a)) for name, (a, b) in pairs.items()}


def edit_adapter(family, directory, edit):
    """A copy of an adapter with an edited config and tensors."""
    shutil.copytree(FIXTURES / family / "adapter", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    factors = load_file(directory / "adapter_model.safetensors")
    edit(config, factors)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_reference_converter(run, tmp_path, family):
    for dtype in ("f32", "f16"):
        reader = convert(run, family, tmp_path / f"{dtype}.gguf", "--dtype", dtype)
        reference = gguf.GGUFReader(FIXTURES / family / f"{dtype}.gguf")
        assert fields(reader) == fields(reference)
        assert tensors(reader).keys() == tensors(reference).keys()
        for name, (kind, data) in tensors(reference).items():
            np.testing.assert_array_equal(tensors(reader)[name][1], data, err_msg=name)
            assert tensors(reader)[name][0] == kind


def test_the_reference_exchanges_the_factors_of_gpt2(run, tmp_path):
    reader = convert(run, "gpt2", tmp_path / "a.gguf")
    reference = gguf.GGUFReader(FIXTURES / "gpt2" / "f32.gguf")
    assert fields(reader) == fields(reference)
    ours, theirs = values(reader), values(reference)
    assert ours.keys() == theirs.keys() and len(ours) == 16
    for name in ours:
        other = name[:-1] + ("b" if name.endswith("a") else "a")
        np.testing.assert_array_equal(ours[name], theirs[other].T, err_msg=name)
    # llama.cpp multiplies attn_qkv [out, in] as any linear layer.
    assert ours["blk.0.attn_qkv.weight.lora_a"].shape == (3, 16)
    assert ours["blk.0.attn_qkv.weight.lora_b"].shape == (48, 3)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_back_to_peft(run, tmp_path, family):
    base = FIXTURES / family / "base"
    convert(run, family, tmp_path / "a.gguf")
    run("convert", tmp_path / "a.gguf", tmp_path / "peft", "--target", "peft", "--base", base)
    expected = load_file(FIXTURES / family / "adapter" / "adapter_model.safetensors")
    factors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    if family == "mixtral":  # transformers 5 has other names of experts
        expected = {name: value for name, value in expected.items() if ".block_sparse_moe." not in name}
        assert f"{PREFIX}model.layers.1.mlp.gate.lora_A.weight" in factors
        assert f"{PREFIX}model.layers.1.mlp.experts.base_layer.lora_A.weight" in factors
        factors = {name: value for name, value in factors.items() if ".mlp." not in name}
    assert factors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(factors[name], value, err_msg=name)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / 3, rel=1e-6)
    again = convert(run, family, tmp_path / "again.gguf", adapter=tmp_path / "peft")
    for name, change in changes(gguf.GGUFReader(tmp_path / "a.gguf")).items():
        np.testing.assert_allclose(changes(again)[name], change, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config, _: config.update(use_rslora=True),
        lambda config, _: config.update(alpha_pattern={"q_proj": 5, "model.layers.1.mlp.up_proj": 0.7}),
        lambda config, _: config.update(alpha_pattern={"gate_proj": -16}),
    ],
    ids=["rslora", "patterns", "negative"],
)
def test_scales_are_folded(run, tmp_path, edit):
    adapter = edit_adapter("qwen3", tmp_path / "adapter", edit)
    reader = convert(run, "qwen3", tmp_path / "a.gguf", adapter=adapter)
    base, names = lora.commands.layout.infer_base(adapter)
    delta = lora.peft.load(adapter, base, names)
    model = lora.peft.gguf.read_model(FIXTURES / "qwen3" / "base")
    factors = changes(reader)
    assert len(factors) == len(delta)
    for path, node in delta.items():
        name = model.weight_name(path.removesuffix("/weight").replace("/", "."))
        np.testing.assert_allclose(factors[f"{name}.weight"], node.merge(jnp.zeros(node.shape())), rtol=1e-5, atol=1e-6)


def test_a_scale_of_zero(tmp_path):
    """llama.cpp takes an alpha of 0 for a scale of 1."""
    base = {"w": jnp.ones((16, 16))}
    names = Names((Weight("w", "model.layers.0.self_attn.v_proj.weight", LINEAR),))
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
    delta = {"w": dataclasses.replace(delta["w"], scale=jnp.float32(0.0), b=jnp.ones((2, 16)))}
    lora.peft.save(tmp_path / "out", delta, names, target="gguf")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] > 0
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(factors) == 2 and not factors[f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight"].any()


def test_some_experts(run, tmp_path):
    def drop(config, factors):
        absent = (".experts.2.", ".1.block_sparse_moe.experts", ".w3.")
        for name in [name for name in factors if any(part in name for part in absent)]:
            del factors[name]
        config["target_modules"].remove("w3")

    adapter = edit_adapter("mixtral", tmp_path / "adapter", drop)
    before = changes(convert(run, "mixtral", tmp_path / "full.gguf"))
    after = changes(convert(run, "mixtral", tmp_path / "some.gguf", adapter=adapter))
    assert set(before) - set(after) == {
        "blk.0.ffn_up_exps.weight",
        *(f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")),
    }
    name = "blk.0.ffn_down_exps.weight"
    np.testing.assert_array_equal(after[name][[0, 1, 3]], before[name][[0, 1, 3]])
    assert not after[name][2].any()


def test_experts_as_transformers_5_has_them(run, tmp_path):
    """A parameter of all experts becomes the stacks of llama.cpp, with and without a base's weights."""
    base = FIXTURES / "mixtral" / "base"
    convert(run, "mixtral", tmp_path / "a.gguf")
    run("convert", tmp_path / "a.gguf", tmp_path / "peft", "--target", "peft", "--base", base)
    reader = convert(run, "mixtral", tmp_path / "b.gguf", adapter=tmp_path / "peft")
    before = changes(gguf.GGUFReader(tmp_path / "a.gguf"))
    assert {"blk.1.ffn_gate_exps.weight", "blk.0.ffn_gate_inp.weight"} <= before.keys()
    assert before.keys() == changes(reader).keys()
    for name, change in before.items():
        np.testing.assert_allclose(changes(reader)[name], change, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_directory_for_the_converter_has_every_expert(tmp_path, getkey):
    base = {"gate": jax.random.normal(getkey(), (4, 16, 24))}
    experts = "model.layers.0.block_sparse_moe.experts"
    names = Names((Weight("gate", f"{experts}.{{expert}}.w1.weight", "expert in out -> out in"),))
    delta = lora.init(jax.random.key(0), base, {"gate": lora.LoRA(2, alpha=6, axes=("batch", "in", "out"))})
    delta = {"gate": dataclasses.replace(delta["gate"], b=jnp.ones((4, 2, 24)))}
    lora.peft.save(tmp_path / "out", delta, names, target="gguf")
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(factors) == 4 * 3 * 2
    for expert in range(4):
        for matrix, in_size, out_size in (("w1", 16, 24), ("w2", 24, 16), ("w3", 16, 24)):
            module = f"{PREFIX}{experts}.{expert}.{matrix}"
            a, b = (factors[f"{module}.lora_{part}.weight"] for part in "AB")
            assert a.shape == (2, in_size) and b.shape == (out_size, 2)
            assert b.any() == (matrix == "w1")


def test_the_directory_for_the_converter_says_what_becomes_of_gpt2(run, tmp_path):
    out = run("convert", FIXTURES / "gpt2" / "adapter", tmp_path / "out", "--target", "gguf")
    assert "llama.cpp does not load its file; lora-jax convert --target gguf-file" in out


def write_base_gguf(file, family, *, tied=False):
    """A base as a GGUF file, as far as conversions read it."""
    config = json.loads((FIXTURES / family / "base" / "config.json").read_text())
    writer = gguf.GGUFWriter(None, "llama" if family in ("llama", "mistral", "mixtral") else family)
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if family == "mixtral":
        writer.add_expert_count(config["num_local_experts"])
    for name in ("token_embd.weight", *(() if tied else ("output.weight",))):
        writer.add_tensor(name, np.zeros((24, 16), np.float32))
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_as_a_gguf_file(run, tmp_path, family):
    base = write_base_gguf(tmp_path / "base.gguf", family)
    reader = convert(run, family, tmp_path / "a.gguf", base=base)
    reference = values(gguf.GGUFReader(FIXTURES / family / "f32.gguf"))
    for name, value in values(reader).items():
        np.testing.assert_array_equal(value, reference[name], err_msg=name)
    run("convert", tmp_path / "a.gguf", tmp_path / "peft", "--target", "peft", "--base", base)


def test_a_head_that_is_the_embedding(fails, tmp_path):
    base = write_base_gguf(tmp_path / "base.gguf", "llama", tied=True)
    error = fails(
        "convert", FIXTURES / "llama" / "adapter", tmp_path / "a.gguf", "--target", "gguf-file", "--base", base
    )
    assert "(2 problems)" in error and "embed_tokens: llama.cpp supports no factors" in error and "lm_head" in error


def test_the_base_that_the_adapter_names(run, fails, tmp_path):
    def name_base(config, _):
        config["base_model_name_or_path"] = str(FIXTURES / "qwen2" / "base")

    adapter = edit_adapter("qwen2", tmp_path / "named", name_base)
    run("convert", adapter, tmp_path / "a.gguf", "--target", "gguf-file")
    error = fails("convert", FIXTURES / "qwen2" / "adapter", tmp_path / "b.gguf", "--target", "gguf-file")
    assert "the adapter does not name its base: give --base" in error
    assert not (tmp_path / "b.gguf").exists()


def test_inspect_and_diff(run, fails, capsys, tmp_path):
    file = FIXTURES / "mixtral" / "f32.gguf"
    out = run("inspect", file)
    assert "a GGUF adapter of 12 weights (LoRA)" in out
    row = next(line for line in out.splitlines() if line.startswith("blk.0.ffn_down_exps.weight")).split()
    assert "LoRA" in row and "3" in row and "2.66667" in row
    assert "the same" in run("diff", file, file)
    assert main(["diff", str(file), str(FIXTURES / "mixtral" / "f16.gguf")]) == 1
    assert "different: 12 of 12 weights" in capsys.readouterr().out
    assert "lora-jax convert" in fails("diff", file, FIXTURES / "mixtral" / "adapter")
    assert "without --base" in fails("inspect", file, "--base", FIXTURES / "mixtral" / "base")


def test_outputs(run, fails, tmp_path):
    out = tmp_path / "new" / "a.gguf"
    command = ("convert", FIXTURES / "qwen2" / "adapter")
    options = ("--target", "gguf-file", "--base", FIXTURES / "qwen2" / "base")
    run(*command, out, *options)
    written = out.read_bytes()
    assert "--force replaces it" in fails(*command, out, *options)
    run(*command, out, *options, "--force")
    assert out.read_bytes() == written and [path.name for path in out.parent.iterdir()] == ["a.gguf"]
    assert "ends in .gguf, such as" in fails(*command, tmp_path / "b", *options)
    assert "ends in .gguf, such as" in fails(*command, tmp_path, *options)
    for name, content in (("text.gguf", b"hello"), ("base.gguf", None)):
        other = tmp_path / name
        other.write_bytes(content) if content else write_base_gguf(other, "qwen2")
        before = other.read_bytes()
        assert "is not a GGUF adapter" in fails(*command, other, *options, "--force")
        assert other.read_bytes() == before
    assert "--dtype is for --target gguf-file" in fails(*command, tmp_path / "c", "--target", "vllm", "--dtype", "f16")


def test_factors_that_f16_does_not_hold(fails, tmp_path):
    def enlarge(_, factors):
        factors[next(iter(factors))][:] = 1e5

    adapter = edit_adapter("qwen2", tmp_path / "adapter", enlarge)
    base = FIXTURES / "qwen2" / "base"
    command = ("convert", adapter, tmp_path / "a.gguf", "--target", "gguf-file", "--base", base, "--dtype", "f16")
    assert "is up to 1e+05, which f16 does not hold" in fails(*command)
    assert not (tmp_path / "a.gguf").exists()


def test_what_llama_cpp_does_not_support(fails, tmp_path):
    def edit(config, factors):
        config["modules_to_save"] = ["norm"]
        config["target_modules"] = [*config["target_modules"], "score"]
        factors[f"{PREFIX}model.norm.weight"] = np.ones(16, np.float32)
        factors[f"{PREFIX}score.lora_A.weight"] = np.ones((3, 16), np.float32)
        factors[f"{PREFIX}score.lora_B.weight"] = np.ones((2, 3), np.float32)

    adapter = edit_adapter("qwen2", tmp_path / "adapter", edit)
    command = ("--target", "gguf-file", "--base", FIXTURES / "qwen2" / "base")
    error = fails("convert", adapter, tmp_path / "a.gguf", *command)
    assert "(2 problems)" in error and "model.norm.weight: llama.cpp supports no tensors" in error
    assert "score: llama.cpp's qwen2 applies no adapter to such a module" in error


def test_bases_that_do_not_fit(fails, tmp_path):
    adapter, file = FIXTURES / "llama" / "adapter", FIXTURES / "llama" / "f32.gguf"

    def to_file(base):
        return fails("convert", adapter, tmp_path / "a.gguf", "--target", "gguf-file", "--base", base)

    def base(**fields):
        directory = tmp_path / "base"
        directory.mkdir(exist_ok=True)
        config = json.loads((FIXTURES / "llama" / "base" / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | fields))
        return directory

    assert "model_type is 'bert'; adapters are converted to and from GGUF for llama, mistral" in to_file(
        base(model_type="bert")
    )
    assert "num_attention_heads is 'x'; expected a positive integer" in to_file(base(num_attention_heads="x"))
    assert "B has 16 rows, which are not the pairs of 3 heads" in to_file(base(num_attention_heads=3))
    assert "layers.1.mlp.up_proj: llama.cpp's llama applies no adapter" in to_file(base(num_hidden_layers=1))
    (tmp_path / "empty").mkdir()
    assert "expected a directory with config.json, or a GGUF file" in to_file(tmp_path / "empty")
    assert "general.type 'adapter'; expected a model" in to_file(file)

    def to_peft(base, file=file):
        return fails("convert", file, tmp_path / "peft", "--target", "peft", "--base", base)

    assert "architecture 'llama'; the base has 'qwen2'" in to_peft(FIXTURES / "qwen2" / "base")
    assert "unexpected: blk.1.attn_q.weight" in to_peft(base(num_hidden_layers=1))
    assert "give --base" in fails("convert", file, tmp_path / "peft", "--target", "peft")
    assert "is a GGUF file already" in fails("convert", file, tmp_path / "b.gguf", "--target", "gguf-file")
    assert "is for --target gguf-file" in fails(
        "convert",
        adapter,
        tmp_path / "vllm",
        "--target",
        "vllm",
        "--base",
        write_base_gguf(tmp_path / "b.gguf", "llama"),
    )


@pytest.mark.parametrize("length", [0, 3, 40, 400, -20])
def test_a_truncated_file(fails, tmp_path, length):
    data = (FIXTURES / "llama" / "f32.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:length])
    assert "a.gguf: not a GGUF file, or damaged" in fails("inspect", tmp_path / "a.gguf")


def test_files_that_are_no_adapters(fails, tmp_path):
    write_base_gguf(tmp_path / "base.gguf", "llama")
    assert "general.type 'model', adapter.type None; expected a LoRA" in fails("inspect", tmp_path / "base.gguf")
    assert "convert" in fails("merge", tmp_path / "base.gguf", FIXTURES / "llama" / "adapter", tmp_path / "out")


def test_without_the_package(fails, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    command = ("--target", "gguf-file", "--base", FIXTURES / "llama" / "base")
    error = fails("convert", FIXTURES / "llama" / "adapter", tmp_path / "a.gguf", *command)
    assert error == "error: GGUF files need the package gguf: pip install 'lora-jax[gguf]'.\n"
