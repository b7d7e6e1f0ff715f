"""Experts in transformers 5: PEFT's factors of one parameter for all experts, and a matrix for each in files.

`fixtures/transformers/make_adapters.py` says what the fixtures are.
"""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.__main__ import main
from tests.peft.cases import PREFIX, read_config
from tests.peft.test_ties import FIXTURES, close, program, tokens

MIXTRAL = FIXTURES / "models" / "mixtral"
CASES = ["mixtral_all", "mixtral_fused", "mixtral_down", "mixtral_uneven"]
QWEN = ["qwen3moe_all", "qwen3moe_fused"]


@pytest.fixture(scope="module")
def model():
    return program(MIXTRAL)


def run(fn, base, delta):
    return jax.jit(lora.adapt(fn))(base, delta, tokens(MIXTRAL))


@pytest.mark.parametrize("case", CASES)
def test_loaded_and_written_again(case, model, tmp_path):
    fn, base, names = model
    adapter = FIXTURES / "adapters" / case
    delta = lora.peft.load(adapter, base, names)
    close(run(fn, base, delta), adapter)
    lora.peft.save(tmp_path / "out", delta, names)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", base, names), delta)


@pytest.mark.parametrize("case", CASES)
def test_merged(case, tmp_path):
    adapter = FIXTURES / "adapters" / case
    assert main(["merge", str(MIXTRAL), str(adapter), str(tmp_path / "out")]) == 0
    fn, base, _ = program(tmp_path / "out")
    close(fn(base, tokens(MIXTRAL)), adapter)


@pytest.mark.parametrize("case", QWEN)
def test_merged_tensors_of_another_model(case, tmp_path):
    base, adapter = FIXTURES / "models" / "qwen3moe", FIXTURES / "adapters" / case
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 0
    merged, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(adapter / "merged.safetensors")
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", [*CASES, *QWEN])
@pytest.mark.parametrize("based", [True, False])
def test_converted(case, based, tmp_path):
    adapter = FIXTURES / "adapters" / case
    options = ["--base", str(FIXTURES / "models" / case.partition("_")[0])] if based else []
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--target", "peft", *options]) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)


def trained(base, spec, fn):
    delta = lora.init(jax.random.key(0), base, spec, fn, tokens(MIXTRAL))
    train, frozen = lora.partition(delta)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return lora.join(jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), train), frozen)


SPECS = {
    "all": {"feed_forward/(gate|up|down)": lora.LoRA(2, alpha=5)},
    "uneven": {"/gate/": lora.LoRA(3, alpha=5), "/up/": lora.LoRA(1, alpha=2), "/down/": lora.LoRA(2)},
    "gate_alone": {"feed_forward/gate": lora.LoRA(2, alpha=3)},
    "dropout": {"feed_forward/(up|down)": lora.LoRA(2, dropout=0.1), "query": lora.LoRA(2, dropout=0.1)},
}


@pytest.mark.parametrize("name", SPECS)
def test_trained_here(name, model, tmp_path):
    """Factors of separate matrices become those of the parameter, with the same outputs, and separate ones again."""
    fn, base, names = model
    delta = trained(base, SPECS[name], fn)
    lora.peft.save(tmp_path / "out", delta, names)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(".w1." in key for key in stored) and any(".mlp.experts." in key for key in stored)
    assert read_config(tmp_path / "out")["lora_dropout"] == 0
    again = lora.peft.load(tmp_path / "out", base, names)
    np.testing.assert_allclose(run(fn, base, again), run(fn, base, delta), rtol=1e-4, atol=1e-5)
    if name == "all":
        jax.tree.map(np.testing.assert_array_equal, again, delta)


def test_factors_for_each_expert_as_transformers_4_has_them(model, tmp_path):
    """`experts.0.w1`: read here, and the same adapter."""
    fn, base, names = model
    delta = trained(base, SPECS["all"], fn)
    lora.peft.save(tmp_path / "out", delta, names, target="vllm")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"{PREFIX}model.layers.1.block_sparse_moe.experts.2.w3.lora_B.weight" in stored
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", base, names), delta)


def test_dora_on_experts_is_refused_for_peft(model, tmp_path):
    fn, base, names = model
    delta = lora.init(jax.random.key(0), base, {"feed_forward/down": lora.DoRA(2)}, fn, tokens(MIXTRAL))
    with pytest.raises(ValueError, match=r"experts\.down_proj: PEFT has no DoRA on experts"):
        lora.peft.save(tmp_path / "out", delta, names)


@pytest.mark.parametrize("target", ["peft", "mlx", "vllm"])
def test_biases_on_experts_are_refused(target, model, tmp_path):
    fn, base, names = model
    delta = trained(base, {"feed_forward/down": lora.LoRA(2)}, fn)
    for path, node in delta.items():
        delta[path] = dataclasses.replace(node, bias=node.b[..., 0, :])
    with pytest.raises(ValueError, match=r"experts.*no bias on B"):
        lora.peft.save(tmp_path / "out", delta, names, target=target, base=base)


def test_a_last_expert_whose_factors_are_zero(model, tmp_path):
    fn, base, names = model
    delta = trained(base, SPECS["all"], fn)
    delta = jax.tree.map(lambda x: x.at[-1].set(0) if x.ndim == 3 else x, delta)
    lora.peft.save(tmp_path / "out", delta, names)
    again = lora.peft.load(tmp_path / "out", base, names)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base, again), lora.merge(base, delta))


# The forms that other readers have.


def test_mlx_has_one_module_for_all_experts(model, tmp_path):
    """`LoRASwitchLinear`: lora_a [experts, rank, in], lora_b [experts, out, rank]; y += scale · b·a·x."""
    fn, base, names = model
    delta = trained(base, SPECS["uneven"], fn)
    lora.peft.save(tmp_path / "out", delta, names, target="mlx")
    stored, parameters = load_file(tmp_path / "out" / "adapters.safetensors"), lora_parameters(tmp_path / "out")
    merged = lora.merge(base, delta)
    for name, ours in {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}.items():
        for layer in range(2):
            a, b = (stored[f"model.layers.{layer}.block_sparse_moe.switch_mlp.{name}.lora_{x}"] for x in "ab")
            change = parameters["scale"] * np.einsum("eor,eri->eio", b, a)
            old, new = (tree["layers"][layer]["feed_forward"][ours]["kernel"] for tree in (base, merged))
            np.testing.assert_allclose(change, new - old, rtol=1e-4, atol=1e-5)
    assert set(parameters["keys"]) == {f"block_sparse_moe.switch_mlp.{x}_proj" for x in ("gate", "up", "down")}


@pytest.mark.parametrize("case", [*CASES, *QWEN])
@pytest.mark.parametrize("based", [True, False])
def test_experts_of_mlx_are_read_again(case, based, tmp_path, capsys):
    base, adapter = str(FIXTURES / "models" / case.partition("_")[0]), str(FIXTURES / "adapters" / case)
    mlx, again = str(tmp_path / "mlx"), str(tmp_path / "again")
    assert main(["convert", adapter, mlx, "--target", "mlx", "--base", base]) == 0, capsys.readouterr().err
    options = ["--base", base] if based else []
    assert main(["inspect", mlx, *options]) == 0, capsys.readouterr().err
    assert main(["convert", mlx, again, "--target", "peft", *options]) == 0, capsys.readouterr().err
    assert {name for name in load_file(f"{again}/adapter_model.safetensors") if "experts" in name} == {
        name for name in load_file(f"{adapter}/adapter_model.safetensors") if "experts" in name
    }
    merged = []
    for number, directory in enumerate((adapter, mlx, again)):
        assert main(["merge", base, directory, str(tmp_path / str(number))]) == 0, capsys.readouterr().err
        merged.append(load_file(tmp_path / str(number) / "model.safetensors"))
    for other in merged[1:]:
        for name, value in merged[0].items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_experts_of_mlx_are_loaded(model, tmp_path):
    fn, base, names = model
    delta = trained(base, SPECS["all"], fn)
    lora.peft.save(tmp_path / "out", delta, names, target="mlx")
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", base, names), delta)


def lora_parameters(directory):
    return read_config(directory)["lora_parameters"]


@pytest.mark.parametrize("target, out", [("vllm", "experts.0.w1"), ("mlx", "switch_mlp.gate_proj")])
def test_fused_factors_for_readers_of_separate_ones(target, out, tmp_path, capsys):
    adapter = FIXTURES / "adapters" / "mixtral_fused"
    args = ["convert", adapter, tmp_path / "out", "--target", target, "--base", MIXTRAL]
    assert main([*map(str, args)]) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert any(out in name for name in load_file(file))


def test_fused_factors_as_they_are(tmp_path, capsys):
    """vLLM reads 3-D experts: one rank and one scale for all, down_proj on the module, gate_up_proj one wrapper in."""
    adapter = FIXTURES / "adapters" / "mixtral_uneven"
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--target", "vllm"]) == 0
    stored, config = load_file(tmp_path / "out" / "adapter_model.safetensors"), read_config(tmp_path / "out")
    assert config["rank_pattern"] == {} and config["alpha_pattern"] == {} and config["r"] == 2
    a, b = (stored[f"{PREFIX}model.layers.0.mlp.experts.lora_{x}.weight"] for x in "AB")
    assert a.shape == (6, 12) and b.shape == (8, 6)
    before = load_file(adapter / "adapter_model.safetensors")
    old_a, old_b = (before[f"{PREFIX}model.layers.0.mlp.experts.lora_{x}.weight"] for x in "AB")
    one, other = (
        scale * np.einsum("ore,eri->eoi", b.reshape(8, -1, 3), a.reshape(3, -1, 12))
        for scale, a, b in ((config["lora_alpha"] / config["r"], a, b), (5.0, old_a, old_b))  # α / √1
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert main(["convert", str(adapter), str(tmp_path / "mlx"), "--target", "mlx"]) == 2
    assert "--base" in capsys.readouterr().err
    down = FIXTURES / "adapters" / "mixtral_down"
    assert main(["convert", str(down), str(tmp_path / "down"), "--target", "vllm"]) == 2
    assert "gate_up_proj and down_proj together" in capsys.readouterr().err
