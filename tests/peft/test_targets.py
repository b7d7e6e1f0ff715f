"""Adapters saved for other readers: what each computes from the files is the merged weight, or saving is refused.

How each reads its files, from its source: vLLM takes one scale for all modules and knows no patterns; llama.cpp's
converter divides alpha by each B's own rank and knows neither patterns nor rsLoRA; mlx-lm has one raw scale and
one rank for all modules.
"""

import numpy as np
import pytest

import lora_jax as lora
from tests.peft.cases import CASES, PREFIX, read, read_config
from tests.peft.meaning import deltas, rank_and_scale

PLAIN = [
    "linear",
    "conv1d_hf",
    "llama",
    "llama, stacked",
    "patterns",
    "rslora",
    "rslora_patterns",
    "rslora_patterns, stacked",
    "stacked_uneven",
    "stacked_some",
    "parts_uneven",
    "heads",
    "embedding",
]
"""Adapters that every target can hold, folded or not."""

REFUSED = {
    ("vllm", "dora_linear"): r"fc\b.*DoRA|DoRA.*fc\b",
    ("vllm", "modules_to_save"): r"classifier",
    ("vllm", "bias_all"): r"norm\.bias",
    ("vllm", "bias_lora_only"): r"fc1\.bias|fc1\.base_layer\.bias",
    ("vllm", "lora_bias"): r"fc\b.*bias",
    ("vllm", "trainable_tokens"): r"embed",
    ("gguf", "dora_linear"): r"fc\b.*DoRA|DoRA.*fc\b",
    ("gguf", "bias_all"): r"norm\.bias",
    ("gguf", "bias_lora_only"): r"fc1\.bias|fc1\.base_layer\.bias",
    ("gguf", "lora_bias"): r"fc\b.*bias",
    ("gguf", "trainable_tokens"): r"embed",
    ("mlx", "bias_all"): r"norm\.bias",
    ("mlx", "lora_bias"): r"fc\b.*bias",
    ("mlx", "trainable_tokens"): r"embed",
    ("mlx", "conv2d"): r"conv",
}


def exported(name, target, directory):
    case = CASES[name]
    base = case.base
    delta = lora.peft.load(case.adapter, base, case.names)
    lora.peft.save(directory, delta, case.names, target=target)
    return case


def changes(case):
    """ΔW of each module that PEFT's merge changes, in torch's layout."""
    before = case.base_tensors
    return {name.removesuffix(".weight"): after - before[name] for name, after in case.merged_tensors.items()}


def same(deltas, case):
    expected = changes(case)
    assert deltas.keys() == expected.keys()
    for module, delta in deltas.items():
        # transformers' Conv1D stores its weight the other way round; B·A is as for any linear layer.
        delta = delta.T if case.fixture == "conv1d_hf" else delta
        np.testing.assert_allclose(delta, expected[module], rtol=1e-4, atol=1e-5, err_msg=module)


@pytest.mark.parametrize("name", PLAIN)
def test_vllm(name, tmp_path, capsys):
    case = exported(name, "vllm", tmp_path / "out")
    tensors, config = read(tmp_path / "out" / "adapter_model.safetensors"), read_config(tmp_path / "out")
    assert not config.get("use_dora") and not config.get("modules_to_save") and config.get("bias", "none") == "none"
    _, scale = rank_and_scale(config, "")
    same(deltas(tensors, lambda module, rank: scale), case)
    # It checks the config's rank against max_lora_rank, and every factor has to fit too.
    ranks = {min(a.shape) for name, a in tensors.items() if "lora_A" in name or "lora_embedding_A" in name}
    assert max(ranks) <= config["r"]
    printed = capsys.readouterr().out
    least = min(n for n in (1, 8, 16, 32, 64, 128, 256, 320, 512) if n >= config["r"])
    assert "max_lora_rank" in printed and str(least) in printed


@pytest.mark.parametrize("name", PLAIN)
def test_gguf(name, tmp_path):
    case = exported(name, "gguf", tmp_path / "out")
    tensors, config = read(tmp_path / "out" / "adapter_model.safetensors"), read_config(tmp_path / "out")
    same(deltas(tensors, lambda module, rank: config["lora_alpha"] / rank), case)
    assert not config.get("use_dora") and not config.get("alpha_pattern")


@pytest.mark.parametrize("name", PLAIN)
def test_mlx(name, tmp_path):
    case = exported(name, "mlx", tmp_path / "out")
    tensors, config = read(tmp_path / "out" / "adapters.safetensors"), read_config(tmp_path / "out")
    parameters = config["lora_parameters"]
    factors = {}
    for key, array in tensors.items():
        module, _, part = key.rpartition(".")
        assert part in ("lora_a", "lora_b"), key
        factors.setdefault(module, {})[part] = array.astype(np.float64)
    assert {f["lora_a"].shape[1] for f in factors.values()} == {parameters["rank"]}
    embeddings = {"embed"}
    deltas = {}
    for module, f in factors.items():
        delta = parameters["scale"] * f["lora_a"] @ f["lora_b"]
        deltas[module] = delta if module in embeddings else delta.T
    same(deltas, case)
    assert config["fine_tune_type"] == "lora"
    # Read without defaults; keys that are left out mean query and value alone.
    assert isinstance(config["num_layers"], int) and isinstance(parameters["dropout"], float)
    for module in factors:
        assert any(module == key or module.endswith(f".{key}") for key in parameters["keys"])


def test_mlx_adapts_every_layer_that_has_an_adapter(tmp_path):
    """It adapts the last `num_layers`, all where that is not positive, and skips tensors of the others in silence."""
    case = CASES["stacked, unrolled"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    first = {path: node for path, node in delta.items() if path.startswith("layers/0/")}
    lora.peft.save(tmp_path / "out", first, case.names, target="mlx")
    layers = read_config(tmp_path / "out")["num_layers"]
    assert layers <= 0 or layers >= 3


def test_mlx_has_magnitudes(tmp_path):
    case = exported("dora_linear", "mlx", tmp_path / "out")
    tensors, config = read(tmp_path / "out" / "adapters.safetensors"), read_config(tmp_path / "out")
    assert config["fine_tune_type"] == "dora"
    stored = read(case.adapter / "adapter_model.safetensors")
    for module in ("fc", "square"):
        np.testing.assert_array_equal(tensors[f"{module}.m"], stored[f"{PREFIX}{module}.lora_magnitude_vector"])
        np.testing.assert_array_equal(tensors[f"{module}.lora_a"], stored[f"{PREFIX}{module}.lora_A.weight"].T)


@pytest.mark.parametrize("target", ["vllm", "gguf"])
@pytest.mark.parametrize("name", ["linear", "llama", "stacked"])
def test_nothing_is_folded_without_need(name, target, tmp_path):
    case = exported(name, target, tmp_path / "out")
    before, after = (read(d / "adapter_model.safetensors") for d in (case.adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.parametrize("target, name", REFUSED, ids=lambda value: value)
def test_what_a_target_cannot_hold_is_refused_by_name(target, name, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[target, name]) as caught:
        exported(name, target, tmp_path / "out")
    assert target in str(caught.value).lower() or {"gguf": "llama.cpp"}.get(target, target) in str(caught.value)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_all_that_a_target_refuses_is_in_one_error(tmp_path):
    with pytest.raises(ValueError) as caught:
        exported("bias_all", "vllm", tmp_path / "out")
    for name in ("fc1", "norm.bias", "fc2.bias", "classifier.bias"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", ["stacked_uneven", "rslora_patterns", "linear", "embedding"])
@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_peft_reads_it_too(name, target, tmp_path):
    """Both are directories in PEFT's format, with the same meaning there."""
    case = exported(name, target, tmp_path / "out")
    base = case.base
    again = lora.merge(base, lora.peft.load(tmp_path / "out", base, case.names))
    for tensor, array in case.torch(again).items():
        expected = case.merged_tensors.get(tensor, case.base_tensors[tensor])
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5, err_msg=tensor)
