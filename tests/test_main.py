"""The command line: what it prints, what it writes, and that it writes nothing when something is wrong."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.__main__ import main
from lora_jax.commands import merging as merge_command
from lora_jax.io import files
from tests.peft.cases import CASES, PREFIX, read, read_config, write_adapter

FIXTURE = {case.fixture: case for case in CASES.values()}
# All their matrices are square, and the config does not say what PEFT knew from the model.
UNTOLD = {"conv1d_hf_beside_linear", "experts_two_named_the_other_way_round"}
MERGED = sorted(name for name, case in FIXTURE.items() if case.merged_tensors and name not in UNTOLD)
CONFIGS = {"conv1d_hf": {"model_type": "gpt2"}, "experts_transposed": {"model_type": "gpt_oss"}}


def model_config(fixture):
    return next((config for name, config in CONFIGS.items() if name in fixture), {"model_type": "llama"})


def write_base(directory, tensors, config=None):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def shard(directory, tensors, count=2):
    """A base in several files; returns the index."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    files = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        shard = {name: tensors[name] for name in names if files[name] == file}
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.fixture
def base(tmp_path):
    """The base of the fixture 'llama'."""
    return write_base(tmp_path / "base", CASES["llama"].base_tensors)


@pytest.fixture
def adapter(tmp_path):
    """A copy of the adapter of the fixture 'llama'."""
    shutil.copytree(CASES["llama"].adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def run(capsys):
    """A function that runs a command and gives its status, output and errors."""

    def call(*args):
        status = main([*map(str, args)])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def fails(run, tmp_path):
    """A function that runs a command that must fail: one error, status 2, and no file or directory changed."""

    def call(*args):
        before = listing(tmp_path)
        status, out, err = run(*args)
        assert status == 2 and out == "", (status, out)
        assert err.startswith("error: ") and err.count("error:") == 1 and "Traceback" not in err, err
        assert listing(tmp_path) == before
        return err

    return call


def listing(directory):
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(directory.rglob("*"))}


def edit_adapter(directory, tensors=None, config=None):
    stored = read(directory / "adapter_model.safetensors")
    for key, value in (tensors or {}).items():
        if value is None:
            del stored[PREFIX + key]
        else:
            stored[PREFIX + key] = value
    write_adapter(directory, stored, read_config(directory) | (config or {}))


# inspect


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-jax {lora.__version__}\n"


def test_inspect(run, base, adapter):
    status, out, err = run("inspect", adapter)
    assert status == 0 and err == ""
    assert "a PEFT adapter of 14 weights (LoRA)" in out and "base: not named" in out and "464 trained numbers" in out
    (row,) = [line.split() for line in out.splitlines() if "layers.1.self_attn.v_proj" in line]
    assert row[1:6] == ["4×8", "LoRA", "2", "5", "2.5"] and row[-1] == "24"
    a, b = (
        read(adapter / "adapter_model.safetensors")[f"{PREFIX}model.layers.1.self_attn.v_proj.lora_{x}.weight"]
        for x in "AB"
    )
    assert float(row[6]) == pytest.approx(2.5 * np.linalg.norm(b @ a), rel=1e-3)


def test_inspect_with_the_base(run, base, adapter):
    status, out, _ = run("inspect", adapter, "--base", base)
    assert status == 0 and f"fits {base}" in out
    (row,) = [line.split() for line in out.splitlines() if "layers.1.self_attn.v_proj" in line]
    weight = np.linalg.norm(CASES["llama"].base_tensors["model.layers.1.self_attn.v_proj.weight"])
    assert row[7] == f"{float(row[6]) / weight:.2%}" or float(row[7][:-1]) == pytest.approx(
        100 * float(row[6]) / weight, rel=1e-2
    )


def test_inspect_with_another_base(fails, tmp_path, adapter):
    other = write_base(tmp_path / "other", CASES["bert"].base_tensors)
    text = fails("inspect", adapter, "--base", other)
    assert "28 problems" in text and "nearest" in text and "more" in text and text.count("\n") < 16


def test_inspect_names_the_base(run, adapter):
    edit_adapter(adapter, config={"base_model_name_or_path": "some/[bold]model[/bold] :smile:"})
    assert "base: some/[bold]model[/bold] :smile:, according to the adapter" in run("inspect", adapter)[1]


def test_inspect_numbers_sort_as_numbers(run, tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in (2, 10, 1):
        tensors[f"{PREFIX}layers.{layer}.up.lora_A.weight"] = rng.normal(size=(2, 4)).astype(np.float32)
        tensors[f"{PREFIX}layers.{layer}.up.lora_B.weight"] = rng.normal(size=(6, 2)).astype(np.float32)
    write_adapter(tmp_path, tensors, {"peft_type": "LORA", "r": 2, "target_modules": ["up"]})
    rows = [line.split()[0] for line in run("inspect", tmp_path)[1].splitlines() if line.startswith("layers")]
    assert rows == ["layers.1.up.weight", "layers.2.up.weight", "layers.10.up.weight"]


def test_an_adapter_that_changes_nothing(run, base, adapter):
    stored = read(adapter / "adapter_model.safetensors")
    zeros = {name: np.zeros_like(value) if "lora_B" in name else value for name, value in stored.items()}
    write_adapter(adapter, zeros, read_config(adapter))
    assert "every ΔW is zero: this adapter changes nothing" in run("inspect", adapter)[1]
    status, out, _ = run("merge", base, adapter, base.parent / "out")
    assert status == 0 and "the merge changes nothing" in out
    assert (base.parent / "out" / "model.safetensors").read_bytes()[-100:] == (base / "model.safetensors").read_bytes()[
        -100:
    ]


def test_one_weight_that_does_not_change(run, base, adapter):
    edit_adapter(adapter, {"model.layers.0.mlp.up_proj.lora_B.weight": np.zeros((12, 2), np.float32)})
    assert "ΔW is zero for 1 weight: model.layers.0.mlp.up_proj.weight" in run("inspect", adapter)[1]
    assert (
        "1 adapted weight unchanged: model.layers.0.mlp.up_proj.weight"
        in run("merge", base, adapter, base.parent / "out")[1]
    )


@pytest.mark.parametrize("fixture", ["dora_linear", "modules_to_save", "trainable_tokens", "lora_bias", "experts_two"])
def test_inspect_with_the_base_says_what_every_kind_changes(run, fixture, tmp_path):
    case = FIXTURE[fixture]
    write_base(tmp_path / "base", case.base_tensors)
    status, out, err = run("inspect", case.adapter, "--base", tmp_path / "base")
    assert status == 0, err
    for name, value in case.merged_tensors.items():
        (row,) = [line.split() for line in out.splitlines() if line.startswith(f"{name} ")]
        change = np.linalg.norm(value.astype(np.float64) - case.base_tensors[name])
        assert any(x == f"{change:.4g}" for x in row) or float(row[-3]) == pytest.approx(change, rel=1e-3, abs=1e-6)


def test_an_embedding_stored_in_full(run, fails, tmp_path):
    """Only the base tells whether it was trained."""
    case = CASES["embedding_saved"]
    base = write_base(tmp_path / "base", case.base_tensors)
    assert "also stores embed_tokens.weight in full" in run("inspect", case.adapter)[1]
    assert "also stores" not in run("inspect", case.adapter, "--base", base)[1]
    text = fails("convert", case.adapter, tmp_path / "out", "--target", "vllm")
    assert "embed_tokens.weight" in text and "--base" in text
    assert run("convert", case.adapter, tmp_path / "out", "--target", "vllm", "--base", base)[0] == 0
    assert not any("base_layer" in key for key in read(tmp_path / "out" / "adapter_model.safetensors"))
    assert run("diff", case.adapter, case.adapter)[0] == 0
    status, out, _ = run("diff", case.adapter, tmp_path / "out")  # the copy of the base's is beside factors
    assert status == 0 and "the same: 2 weights" in out and "in full" not in out
    edit_adapter(tmp_path / "out", {"embed_tokens.base_layer.weight": np.ones((14, 8), np.float32)})
    status, out, _ = run("diff", case.adapter, tmp_path / "out")
    assert status == 1 and "embed_tokens.weight, stored in full in both, differs" in out


def test_a_module_that_is_saved_by_the_end_of_its_name(run, base, adapter, tmp_path):
    """PEFT wraps whatever ends so: `norm` is `post_attention_layernorm`, and one name or two are the same."""
    norm = "model.layers.0.post_attention_layernorm"
    edit_adapter(adapter, {f"{norm}.weight": np.ones(8, np.float32)}, {"modules_to_save": ["norm", "norm"]})
    shutil.copytree(adapter, tmp_path / "other")
    edit_adapter(tmp_path / "other", {}, {"modules_to_save": [norm]})
    status, out, _ = run("diff", adapter, tmp_path / "other")
    assert status == 0 and "modules_to_save" not in out and "in full" not in out
    edit_adapter(tmp_path / "other", {}, {"modules_to_save": None})
    status, out, _ = run("diff", adapter, tmp_path / "other")
    assert status == 1 and f"{tmp_path / 'other'} stores {norm}.weight in full" in out


def native(directory, change=0.0):
    import jax

    params = {"up": {"kernel": np.ones((4, 6), np.float32)}}
    recipe = lora.LoRA(2, alpha=4, axes=("in", "out"), init="gaussian")
    delta = lora.init(jax.random.key(0), params, {"up/": recipe})
    delta = jax.tree.map(lambda leaf: leaf + leaf.dtype.type(change) if leaf.ndim > 1 else leaf, delta)
    lora.save(directory, delta, base=params)
    return directory


def test_adapters_of_this_library(run, fails, base, tmp_path):
    one, other = native(tmp_path / "one"), native(tmp_path / "other", 0.5)
    status, out, _ = run("inspect", one)
    assert status == 0 and "a lora_jax adapter of 1 weight (LoRA)" in out and "up/kernel" in out
    assert run("diff", one, one)[0] == 0
    assert run("diff", one, other)[0] == 1
    for text in (
        fails("merge", base, one, tmp_path / "out"),
        fails("convert", one, tmp_path / "out", "--target", "peft"),
        fails("inspect", one, "--base", base),
    ):
        assert "lora_jax.peft.save" in text
    assert "of PEFT, the other of lora_jax" in fails("diff", CASES["llama"].adapter, one)


NAMED = ["dora_linear", "experts_two", "llama", "modules_to_save"]


def save_named(case, directory):
    """PEFT's adapter on a JAX model, saved by this library with PyTorch's names."""
    lora.save(directory, lora.peft.load(case.adapter, case.base, case.names), names=case.names)
    return directory


@pytest.mark.parametrize("fixture", NAMED)
def test_adapters_of_this_library_with_names(run, fixture, tmp_path):
    case = FIXTURE[fixture]
    adapter = save_named(case, tmp_path / "adapter")
    base = write_base(tmp_path / "base", case.base_tensors, model_config(fixture))
    for source, out in ((case.adapter, "expected"), (adapter, "merged")):
        status, _, err = run("merge", base, source, tmp_path / out)
        assert status == 0, err
    expected, merged = (read(tmp_path / out / "model.safetensors") for out in ("expected", "merged"))
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    status, _, err = run("convert", adapter, tmp_path / "peft", "--target", "peft")
    assert status == 0, err
    for one, other in ((case.adapter, adapter), (adapter, tmp_path / "peft")):
        out, err = run("diff", one, other)[1:]  # the status is 1 if only one of them names a task
        assert "the same" in out, out + err
    status, out, _ = run("inspect", adapter)
    assert status == 0 and "has PyTorch's names of the weights, for merge and convert" in out
    status, out, _ = run("inspect", adapter, "--base", base)
    assert status == 0 and f"fits {base}" in out and "a lora_jax adapter" in out


def test_what_pytorch_does_not_have(run, fails, base, tmp_path):
    """The temporary files of a conversion are not in messages."""
    weights = {"w": np.ones((4, 4), np.float32)}
    names = lora.peft.Names((lora.peft.Weight("w", "w.weight", lora.peft.LINEAR),))
    spec = {"w": lora.DoRA(2, axes=("in", "out"), norm_over="out")}
    import jax

    lora.save(tmp_path / "adapter", lora.init(jax.random.key(0), weights, spec), names=names)
    assert "PEFT's DoRA has a magnitude for each output" in fails("merge", base, tmp_path / "adapter", tmp_path / "out")
    lora.save(
        tmp_path / "adapter",
        lora.init(jax.random.key(0), weights, {"w": lora.LoRA(2, axes=("in", "out"))}),
        names=names,
    )
    error = fails("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert "w.lora_A.weight" in error and str(tmp_path / "adapter") in error
    assert tempfile.gettempdir() not in error.replace(str(tmp_path), "")


@pytest.mark.parametrize("names", [[], {}, {"weights": [{"path": "w"}]}, {"weights": [{"path": "w", "name": "{x}"}]}])
def test_damaged_names(fails, base, tmp_path, names):
    adapter = native(tmp_path / "adapter")
    manifest = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps(manifest | {"names": names}))
    assert "adapter.json: 'names' is not a table of names" in fails("merge", base, adapter, tmp_path / "out")


def test_names_of_another_type(tmp_path):
    with pytest.raises(TypeError, match=r"expected a lora.peft.Names as names"):
        lora.save(tmp_path / "adapter", lora.checkpoint.load(native(tmp_path / "one")), names={"w": "w.weight"})


HEADER = {"format": "lora_jax adapter", "version": 1}


@pytest.mark.parametrize(
    "content", ["", [], {}, HEADER, HEADER | {"adapters": {"w": {}}, "base": {}}, HEADER | {"adapters": [], "base": {}}]
)
def test_a_damaged_manifest(fails, tmp_path, content):
    native(tmp_path / "one")
    (tmp_path / "one" / "adapter.json").write_text(json.dumps(content) if content != "" else content)
    assert "adapter.json" in fails("inspect", tmp_path / "one")


def test_damaged_arrays(fails, tmp_path):
    native(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "arrays")
    assert "arrays" in fails("inspect", tmp_path / "one")


# merge


@pytest.mark.parametrize("fixture", MERGED)
def test_merged_tensors_are_those_of_peft(run, fixture, tmp_path):
    case = FIXTURE[fixture]
    write_base(tmp_path / "base", case.base_tensors, model_config(fixture))
    status, _, err = run("merge", tmp_path / "base", case.adapter, tmp_path / "out")
    assert status == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (tmp_path / "base").iterdir()}
    merged, expected = read(tmp_path / "out" / "model.safetensors"), case.merged_tensors
    assert merged.keys() == case.base_tensors.keys()
    for name, before in case.base_tensors.items():
        assert (merged[name].dtype, merged[name].shape) == (before.dtype, before.shape)
        if name not in expected:
            assert merged[name].tobytes() == before.tobytes(), name
            continue
        bound = 1e-6 if before.dtype == np.float32 else 2**-7
        np.testing.assert_allclose(
            np.float32(merged[name]), np.float32(expected[name]), rtol=bound, atol=bound, err_msg=name
        )


def test_ambiguous_parameters_are_refused(fails, tmp_path):
    case = FIXTURE["experts_two_named_the_other_way_round"]
    base = write_base(tmp_path / "base", case.base_tensors)
    text = fails("merge", base, case.adapter, tmp_path / "out")
    assert "down_proj (3, 8, 8)" in text and "more than one way" in text


def test_a_grouped_convolution(run, fails, tmp_path):
    case = FIXTURE["conv2d_grouped"]
    base = write_base(tmp_path / "base", case.base_tensors)
    assert "groups" in fails("merge", base, case.adapter, tmp_path / "out")
    case = FIXTURE["conv2d_grouped_diagonal"]
    assert run("merge", base, case.adapter, tmp_path / "out")[0] == 0


def exact(tmp_path, dtype):
    """A base and an adapter whose ΔW is exact in float32, and it."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 16)).astype(dtype)
    a, b = (rng.integers(-99, 100, size).astype(np.float32) / 1024 for size in ((2, 16), (24, 2)))
    write_base(tmp_path / "base", {"fc.weight": weight, "fc.bias": rng.normal(size=24).astype(dtype)})
    (tmp_path / "adapter").mkdir()
    tensors = {f"{PREFIX}fc.lora_A.weight": a, f"{PREFIX}fc.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]}
    write_adapter(tmp_path / "adapter", tensors, config)
    return weight, 2 * b @ a


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_float32_arithmetic_whatever_is_stored(run, tmp_path, dtype):
    weight, change = exact(tmp_path, dtype)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    merged = read(tmp_path / "out" / "model.safetensors")["fc.weight"]
    expected = (weight.astype(np.float32) + change).astype(dtype)
    assert merged.dtype == dtype
    changed = change != 0
    assert merged[changed].tobytes() == expected[changed].tobytes()
    assert merged[~changed].tobytes() == weight[~changed].tobytes()
    if dtype == ml_dtypes.bfloat16:
        in_bfloat16 = weight + change.astype(dtype)
        assert (in_bfloat16 != merged).any()


def test_a_sharded_base_keeps_its_shards_and_index(run, base, adapter, tmp_path):
    index = shard(base, CASES["llama"].base_tensors, 3)
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    (base / "onnx").mkdir()
    status, out, err = run("merge", base, adapter, tmp_path / "out")
    assert status == 0, err
    assert "not copied: onnx/, pytorch_model.bin" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors.index.json", *index["weight_map"].values()}
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text()) == index
    for name, file in index["weight_map"].items():
        expected = CASES["llama"].merged_tensors.get(name, CASES["llama"].base_tensors[name])
        np.testing.assert_allclose(read(tmp_path / "out" / file)[name], expected, rtol=1e-6, atol=1e-6)


def test_the_layout_of_the_hubs_cache(run, base, adapter, tmp_path):
    """Every file is a link out of the directory."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert run("merge", snapshot, adapter, tmp_path / "out")[0] == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert "q_proj" in run("inspect", adapter, "--base", snapshot)[1]


def test_what_is_not_adapted_may_be_of_any_dtype(run, tmp_path):
    """Quantized tensors, integers and scalars are copied as they are."""
    exact(tmp_path, np.float16)
    others = {
        "other.weight": np.arange(16, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "other.scale": np.array(2.0, np.float32),
        "ids": np.arange(4),
        "mask": np.array([True, False]),
        "inf": np.array([np.inf, np.nan], np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    file = tmp_path / "base" / "model.safetensors"
    save_file(read(file) | others, file)  # without metadata
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")[0] == 0
    content = (tmp_path / "out" / "model.safetensors").read_bytes()
    merged = dict(deserialize(content))
    for name, value in others.items():
        assert (bytes(merged[name]["data"]), merged[name]["shape"]) == (value.tobytes(), [*value.shape])
    assert b'"format":"pt"' in content[: 8 + struct.unpack("<Q", content[:8])[0]]  # transformers asks for it


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn])
def test_an_adapted_weight_that_is_quantized(fails, tmp_path, dtype):
    exact(tmp_path, np.float32)
    save_file({"fc.weight": np.ones((24, 16)).astype(dtype)}, tmp_path / "base" / "model.safetensors")
    text = fails("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "'fc.weight' is quantized" in text


def test_an_adapted_weight_of_gptq(fails, tmp_path):
    exact(tmp_path, np.float32)
    save_file({"fc.qweight": np.ones((2, 24), np.int32)}, tmp_path / "base" / "model.safetensors")
    text = fails("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "'fc.qweight' is quantized" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_in_the_base(fails, base, adapter, tmp_path, bad):
    tensors = CASES["llama"].base_tensors
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = bad
    write_base(base, tensors)
    text = fails("merge", base, adapter, tmp_path / "out")
    assert "'model.layers.1.mlp.up_proj.weight' of the base holds NaN or Inf" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_in_the_adapter(fails, base, adapter, tmp_path, bad):
    edit_adapter(adapter, {"model.layers.0.mlp.up_proj.lora_B.weight": np.full((12, 2), bad, np.float32)})
    text = fails("merge", base, adapter, tmp_path / "out")
    assert "not finite" in text and "model.layers.0.mlp.up_proj.lora_B.weight" in text


def test_a_result_too_large_for_its_dtype(fails, tmp_path):
    exact(tmp_path, np.float16)
    edit_adapter(tmp_path / "adapter", {"fc.lora_A.weight": np.full((2, 16), 1e6, np.float32)})
    text = fails("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "'fc.weight' would hold NaN or Inf" in text and "float16" in text


@pytest.mark.parametrize("longer", ["adapter", "base"])
def test_names_with_and_without_the_prefix(run, tmp_path, longer):
    case, base = CASES["llama"], tmp_path / "base"
    tensors = {name: value for name, value in case.base_tensors.items() if name.startswith("model.")}
    (tmp_path / "adapter").mkdir()
    stored = read(case.adapter / "adapter_model.safetensors")
    if longer == "adapter":
        tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
        write_adapter(tmp_path / "adapter", stored, read_config(case.adapter))
    else:
        shorter = {name.replace(f"{PREFIX}model.", PREFIX): value for name, value in stored.items()}
        write_adapter(tmp_path / "adapter", shorter, read_config(case.adapter))
    write_base(base, tensors)
    status, _, err = run("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert status == 0, err
    merged = read(tmp_path / "out" / "model.safetensors")
    for name, value in case.merged_tensors.items():
        name = name.removeprefix("model.") if longer == "adapter" else name
        np.testing.assert_allclose(merged[name], value, rtol=1e-6, atol=1e-6)


def test_an_adapter_that_unties_the_head_of_a_sharded_checkpoint(run, tmp_path):
    case = CASES["embedding"]
    (name,) = [name for name in case.base_tensors if "embed" in name]
    base = write_base(tmp_path / "base", {"model.embed_tokens.weight": case.base_tensors[name]})
    (base / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}))
    stored = read(case.adapter / "adapter_model.safetensors")
    factors = {
        f"{PREFIX}model.embed_tokens.{key.rpartition('.')[2]}": value for key, value in stored.items() if "lora" in key
    }
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", factors, read_config(case.adapter) | {"target_modules": ["embed_tokens"]})
    stored_index = shard(base, {"model.embed_tokens.weight": case.base_tensors[name], "model.norm.weight": np.ones(8)})
    status, out, err = run("merge", base, tmp_path / "adapter", tmp_path / "out")
    assert status == 0, err
    assert "untied: the adapter changes model.embed_tokens alone" in out
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    assert index["weight_map"] == stored_index["weight_map"] | {"lm_head.weight": file}
    sizes = [case.base_tensors[name].nbytes, stored_index["metadata"]["total_size"]]
    assert index["metadata"]["total_size"] == sum(sizes)
    tensors = read(tmp_path / "out" / file)
    np.testing.assert_array_equal(tensors["lm_head.weight"], case.base_tensors[name])
    np.testing.assert_allclose(tensors["model.embed_tokens.weight"], case.merged_tensors[name], atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    status, out, err = run("inspect", tmp_path / "adapter", "--base", base)
    assert status == 0 and "unties lm_head.weight from model.embed_tokens.weight" in out, err


# convert


@pytest.mark.parametrize("fixture", sorted(set(FIXTURE) - {"embedding_saved", "embedding_saved_untargeted"}))
def test_converted_for_peft(run, fixture, tmp_path):
    case = FIXTURE[fixture]
    if case.refused:
        return
    status, _, err = run("convert", case.adapter, tmp_path / "out", "--target", "peft")
    assert status == 0, err
    before, after = (read(path / "adapter_model.safetensors") for path in (case.adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value.dtype, value.tobytes()) == (after[name].dtype, after[name].tobytes())
    assert run("diff", case.adapter, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("target", ["vllm", "gguf", "mlx"])
def test_converted_for_others(run, target, adapter, base, tmp_path):
    for name, options in {"alone": (), "based": ("--base", base)}.items():
        status, out, err = run("convert", adapter, tmp_path / name, "--target", target, *options)
        assert status == 0, err
        assert "14 weights (LoRA), written for" in out
    assert listing(tmp_path / "alone").values() and [*listing(tmp_path / "alone").values()] == [
        *listing(tmp_path / "based").values()
    ]


def test_what_a_reader_cannot_hold(fails, tmp_path):
    text = fails("convert", CASES["dora_linear"].adapter, tmp_path / "out", "--target", "vllm")
    assert "vLLM has no DoRA" in text


def test_the_base_and_the_task_are_kept(run, adapter, tmp_path):
    edit_adapter(adapter, config={"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM"})
    assert run("convert", adapter, tmp_path / "out", "--target", "peft")[0] == 0
    config = read_config(tmp_path / "out")
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/model", "CAUSAL_LM")


# diff


def test_diff(run, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "other")
    status, out, err = run("diff", adapter, tmp_path / "other")
    assert (status, out, err) == (0, "the same: 14 weights (LoRA)\n", "")
    key = "model.layers.0.mlp.up_proj.lora_B.weight"
    value = read(adapter / "adapter_model.safetensors")[PREFIX + key]
    edit_adapter(tmp_path / "other", {key: 2 * value})
    status, out, _ = run("diff", adapter, tmp_path / "other")
    assert status == 1 and "different: 1 of 14 weights" in out
    (row,) = [line for line in out.splitlines() if "up_proj" in line]
    assert row.split()[0] == "model.layers.0.mlp.up_proj.weight" and "100.00%" in row
    edit_adapter(tmp_path / "other", {key: value}, {"lora_dropout": 0.5})
    status, out, _ = run("diff", adapter, tmp_path / "other")
    assert status == 1 and "dropout 0.5" in out and "0.00%" in out


def test_diff_of_weights_that_one_lacks(run, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "other")
    gone = {f"model.layers.0.mlp.up_proj.lora_{x}.weight": None for x in "AB"}
    edit_adapter(tmp_path / "other", gone, {"target_modules": r".*(q|k|v|o|gate|down)_proj|.*1\.mlp\.up_proj"})
    status, out, err = run("diff", adapter, tmp_path / "other")
    assert status == 1 and "different: 1 of 14 weights" in out, err
    assert "–" in out


@pytest.mark.parametrize("fixture", ["dora_linear", "trainable_tokens", "modules_to_save", "lora_bias"])
def test_diff_of_every_kind(run, fixture, tmp_path):
    case = FIXTURE[fixture]
    shutil.copytree(case.adapter, tmp_path / "other")
    stored = read(case.adapter / "adapter_model.safetensors")
    changed = {name: value + 1 if "lora_A" not in name else value for name, value in stored.items()}
    write_adapter(tmp_path / "other", changed, read_config(case.adapter))
    status, out, err = run("diff", case.adapter, tmp_path / "other")
    assert status == 1 and "%" in out, err


# What goes wrong with what is read.

READERS = {
    "inspect": lambda base, adapter, out: ("inspect", adapter),
    "inspect --base": lambda base, adapter, out: ("inspect", adapter, "--base", base),
    "merge": lambda base, adapter, out: ("merge", base, adapter, out),
    "convert": lambda base, adapter, out: ("convert", adapter, out, "--target", "peft"),
    "diff": lambda base, adapter, out: ("diff", adapter, adapter),
}


@pytest.fixture(params=READERS)
def reader(request, base, adapter, tmp_path):
    return READERS[request.param](base, adapter, tmp_path / "out")


@pytest.mark.parametrize("length", [0, 4, 200, -1])
def test_a_truncated_adapter(fails, reader, adapter, length):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert str(file) in fails(*reader)


def test_an_adapter_with_a_broken_header(fails, reader, adapter):
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[20:40] = bytes(20)
    file.write_bytes(content)
    assert str(file) in fails(*reader)


def test_a_config_that_contradicts_the_tensors(fails, reader, adapter):
    edit_adapter(adapter, config={"r": 3})
    text = fails(*reader)
    assert "(2, 8)" in text and "(3, 8)" in text


def test_a_config_that_is_not_json(fails, reader, adapter):
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    assert "adapter_config.json" in fails(*reader)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5, 6)])
def test_factors_of_odd_shapes(fails, reader, adapter, shape):
    edit_adapter(adapter, {"model.layers.0.mlp.up_proj.lora_A.weight": np.ones(shape, np.float32)})
    assert "up_proj" in fails(*reader)


def test_a_scalar_under_a_name_that_the_base_does_not_have(fails, base, adapter, tmp_path):
    edit_adapter(adapter, {"other.weight": np.ones((), np.float32)})
    assert "other.weight" in fails("merge", base, adapter, tmp_path / "out")


def test_a_factor_without_the_other(fails, reader, adapter):
    edit_adapter(adapter, {"model.layers.0.mlp.up_proj.lora_B.weight": None})
    assert "model.layers.0.mlp.up_proj.lora_B.weight" in fails(*reader)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("fault", ["absent", "loop", "directory"])
def test_a_file_that_is_none(fails, reader, adapter, file, fault):
    (adapter / file).unlink()
    if fault == "loop":
        (adapter / file).symlink_to(adapter / "other")
        (adapter / "other").symlink_to(adapter / file)
    elif fault == "directory":
        (adapter / file).mkdir()
    text = fails(*reader)
    assert file in text
    if fault == "loop":
        assert "broken or circular link" in text


def test_a_pickle(fails, reader, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert "can run code" in fails(*reader)


def test_an_adapter_that_is_not_a_directory(fails, adapter, base, tmp_path):
    for name, command in READERS.items():
        text = fails(*command(base, adapter / "adapter_config.json", tmp_path / "out"))
        assert "is a file, expected the directory that contains it" in text, name
        assert "no such directory" in fails(*command(base, tmp_path / "nowhere", tmp_path / "out"))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for command in READERS.values():
        assert "circular link" in fails(*command(base, loop, tmp_path / "out"))


@pytest.mark.parametrize("inside", ["checkpoint-10", "default", "checkpoint-10/default"])
def test_an_adapter_inside_of_the_directory(run, base, adapter, tmp_path, inside):
    shutil.copytree(adapter, tmp_path / "run" / inside)
    (tmp_path / "run" / "runs").mkdir()
    for args in (
        ("inspect", tmp_path / "run"),
        ("merge", base, tmp_path / "run", tmp_path / "merged"),
        ("convert", tmp_path / "run", tmp_path / "converted", "--target", "peft"),
        ("diff", adapter, tmp_path / "run"),
    ):
        status, _, err = run(*args)
        assert status == 0 and f"the adapter in {inside} is read" in err


def test_parts_of_the_model_itself_are_not_to_be_ignored(fails, base, adapter):
    """Nor is what stands in a part of the base that the adapter's other tensors are in."""
    inside = next(iter(read(adapter / "adapter_model.safetensors"))).removeprefix(PREFIX).split(".")[0]
    edit_adapter(adapter, {f"{inside}.9.other.weight": np.ones((1, 8), np.float32)})
    text = fails("inspect", adapter, "--base", base)
    assert "the base has no such weight" in text and "ignore" not in text


def test_several_adapters_inside_of_the_directory(fails, adapter, tmp_path):
    for number in range(10):
        shutil.copytree(adapter, tmp_path / "run" / f"checkpoint-{number}")
    text = fails("inspect", tmp_path / "run")
    assert "holds 10 adapters (checkpoint-0, checkpoint-1," in text and "and 2 more); name one of them" in text


def test_tensors_of_something_else(run, fails, base, adapter, tmp_path):
    edit_adapter(adapter, {"v_head.summary.weight": np.ones((1, 8), np.float32)})
    assert "--ignore v_head passes it over" in fails("inspect", adapter, "--base", base)
    assert "pass that directory" in fails("inspect", adapter / "adapter_model.safetensors")
    for args in (
        ("inspect", adapter, "--base", base),
        ("merge", base, adapter, tmp_path / "merged"),
        ("convert", adapter, tmp_path / "converted", "--target", "peft", "--base", base),
    ):
        status, _, err = run(*args, "--ignore", "v_head")
        assert status == 0, err
    assert run("diff", CASES["llama"].adapter, tmp_path / "converted")[0] == 0


def test_a_base_that_is_none(fails, adapter, base, tmp_path):
    (tmp_path / "empty").mkdir()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, said in {
        base / "config.json": "is a file",
        tmp_path / "nowhere": "names on a hub are not looked up",
        tmp_path / "empty": "model.safetensors",
        loop: "circular link",
    }.items():
        assert said in fails("merge", path, adapter, tmp_path / "out")
        assert said in fails("inspect", adapter, "--base", path)


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_a_truncated_base(fails, base, adapter, tmp_path, length):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert str(file) in fails("merge", base, adapter, tmp_path / "out")


def broken_index(change):
    def apply(base):
        index = shard(base, CASES["llama"].base_tensors)
        change(index["weight_map"])
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def truncated_shard(base):
    shard(base, CASES["llama"].base_tensors)
    file = base / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def missing_shard(base):
    shard(base, CASES["llama"].base_tensors)
    (base / "model-00002-of-00002.safetensors").unlink()


def linked_in_a_circle(name):
    def apply(base):
        (base / name).unlink(missing_ok=True)
        (base / name).symlink_to(base / name)

    return apply


@pytest.mark.parametrize(
    "fault, said",
    [
        (broken_index(lambda files: files.update({"lm_head.weight": "../base/model.safetensors"})), "../base/model"),
        (broken_index(lambda files: files.update({"lm_head.weight": "/etc/passwd"})), "not a file of this directory"),
        (broken_index(lambda files: files.update({"lm_head.weight": ".."})), "is not a file of this directory"),
        (broken_index(lambda files: files.update({"nowhere": "model-00001-of-00002.safetensors"})), "'nowhere'"),
        (broken_index(lambda files: files.pop("lm_head.weight")), "'lm_head.weight'"),
        (broken_index(lambda files: files.clear()), "names no tensor"),
        (truncated_shard, "model-00002-of-00002.safetensors"),
        (missing_shard, "1 of 2 shards missing"),
        (linked_in_a_circle("model.safetensors"), "circular link"),
        (linked_in_a_circle("tokenizer.json"), "tokenizer.json: a broken or circular link"),
    ],
)
def test_a_base_with_faults(fails, base, adapter, tmp_path, fault, said):
    fault(base)
    assert said in fails("merge", base, adapter, tmp_path / "out")


# What goes wrong with what is written.

WRITERS = {name: READERS[name] for name in ("merge", "convert")}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


def test_an_existing_output(run, fails, writer, base, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert run(*writer(base, adapter, out))[0] == 0  # an empty directory is as good as none
    assert "--force replaces it" in fails(*writer(base, adapter, out))
    assert run(*writer(base, adapter, out), "--force")[0] == 0
    (out / "notes.txt").write_text("mine")
    (out / "optimizer.pt").write_text("mine")
    before = listing(tmp_path)
    assert "did not write (notes.txt, optimizer.pt)" in fails(*writer(base, adapter, out), "--force")
    assert listing(tmp_path) == before


def test_an_output_of_another_program(fails, base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base2")
    shutil.copytree(adapter, tmp_path / "adapter2")
    for command, kind in (("merge", "base2"), ("convert", "adapter2")):
        text = fails(*WRITERS[command](base, adapter, tmp_path / kind), "--force")
        assert "entries that lora_jax did not write" in text and "model.safetensors" in text


def test_the_working_directory_as_output(run, fails, writer, base, adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    for extra in ([], ["--force"]):
        assert run(*writer(base, adapter, "."), *extra)[0] == 0
        assert os.path.samefile(out, ".") and len(os.listdir(tmp_path)) == 3
    (out / "notes.txt").write_text("mine")
    for where in (".", "..", "/"):
        fails(*writer(base, adapter, where), "--force")
    assert (out / "notes.txt").exists()


def test_files_that_are_links(run, fails, writer, base, adapter, tmp_path):
    out, outside = tmp_path / "out", tmp_path / "precious.safetensors"
    assert run(*writer(base, adapter, out))[0] == 0
    (file,) = out.glob("*.safetensors")
    file.rename(outside)
    file.symlink_to(outside)
    content = outside.read_bytes()
    assert file.name in fails(*writer(base, adapter, out), "--force")
    assert file.is_symlink() and outside.read_bytes() == content


def test_without_an_atomic_exchange(run, writer, base, adapter, tmp_path, monkeypatch):
    """A process that is killed between the two renames leaves the old output aside; the next one puts it back."""
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    out = tmp_path / "out"
    assert run(*writer(base, adapter, out))[0] == 0
    assert run(*writer(base, adapter, out), "--force")[0] == 0
    before = listing(tmp_path)
    out.rename(tmp_path / f".out.{'0' * 32}.replaced")
    assert run(*writer(base, adapter, out), "--force")[0] == 0
    assert listing(tmp_path) == before


def test_what_force_does_not_replace(fails, writer, base, adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    assert "only a previous" in fails(*writer(base, adapter, other), "--force")
    assert "is not a directory; only a previous" in fails(*writer(base, adapter, other / "thesis.tex"), "--force")
    for kind in (base, adapter):  # of either kind, but with more than its files
        shutil.copytree(kind, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run" / "checkpoint-10").mkdir()
    assert "checkpoint-10" in fails(*writer(base, adapter, tmp_path / "run"), "--force")


def test_of_the_other_kind(fails, base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "base2")
    shutil.copytree(adapter, tmp_path / "adapter2")
    assert "only a previous checkpoint" in fails("merge", base, adapter, tmp_path / "adapter2", "--force")
    assert "only a previous adapter" in fails("convert", adapter, tmp_path / "base2", "--target", "peft", "--force")


def test_an_output_among_what_is_read(fails, writer, base, adapter, tmp_path):
    (tmp_path / "link").symlink_to(adapter)
    for out, relation in {
        adapter: "be",
        tmp_path / "link": "be",
        adapter / "inside": "be inside of",
        adapter / ".." / "adapter": "be",
        tmp_path: "contain",
    }.items():
        assert f"may not {relation}" in fails(*writer(base, adapter, out), "--force")


def test_the_base_as_output(fails, base, adapter):
    for out in (base, base / "merged"):
        assert "the output may not" in fails("merge", base, adapter, out, "--force")


def test_an_output_that_is_a_link(run, fails, writer, base, adapter, tmp_path):
    loop, link, real = tmp_path / "loop", tmp_path / "link", tmp_path / "real"
    loop.symlink_to(loop)
    assert "circular link" in fails(*writer(base, adapter, loop))
    real.mkdir()
    link.symlink_to(real)
    assert run(*writer(base, adapter, link))[0] == 0
    assert link.is_symlink() and any(real.iterdir())
    assert run(*writer(base, adapter, link), "--force")[0] == 0
    assert link.is_symlink() and len([*tmp_path.iterdir()]) == 5


def test_an_output_under_a_file(fails, writer, base, adapter, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file' / 'out'}" in fails(*writer(base, adapter, tmp_path / "file" / "out"))


def test_an_output_that_may_not_be_written(fails, writer, base, adapter, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    real = os.mkdir

    def mkdir(path, *args, **kwargs):  # modes do not stop the superuser
        if str(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert "Permission denied" in fails(*writer(base, adapter, tmp_path / "closed" / "out"))


@contextlib.contextmanager
def no_file_above(size):
    """What a full disk is like: a write fails in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 300])
def test_a_full_disk(fails, writer, base, adapter, tmp_path, size):
    out = tmp_path / "new" / "out"
    with no_file_above(size):
        text = fails(*writer(base, adapter, out))
    assert text == f"error: {out}: {os.strerror(errno.EFBIG)}.\n"


def test_a_full_disk_leaves_what_was_there(run, fails, writer, base, adapter, tmp_path):
    assert run(*writer(base, adapter, tmp_path / "out"))[0] == 0
    with no_file_above(100):
        fails(*writer(base, adapter, tmp_path / "out"), "--force")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle(run, monkeypatch, base, adapter, tmp_path, number, status):
    def interrupted(*args):
        os.kill(os.getpid(), number)
        return merge_tensor(*args)

    merge_tensor = merge_command.merge_tensor
    monkeypatch.setattr(merge_command, "merge_tensor", interrupted)
    before, handler = listing(tmp_path), signal.getsignal(signal.SIGTERM)
    assert run("merge", base, adapter, tmp_path / "new" / "out") == (status, "", "interrupted: nothing was written\n")
    assert listing(tmp_path) == before and signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_whose_exception_python_drops(run, monkeypatch, base, adapter, tmp_path):
    class Signaling:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(*args):
        Signaling()
        time.sleep(1)
        return merge_tensor(*args)

    merge_tensor = merge_command.merge_tensor
    monkeypatch.setattr(merge_command, "merge_tensor", interrupted)
    before = listing(tmp_path)
    assert run("merge", base, adapter, tmp_path / "new" / "out") == (143, "", "interrupted: nothing was written\n")
    assert listing(tmp_path) == before


def test_a_failing_exchange_restores_what_was_there(fails, run, monkeypatch, writer, base, adapter, tmp_path):
    assert run(*writer(base, adapter, tmp_path / "out"))[0] == 0
    rename = os.rename

    monkeypatch.setattr(files, "exchange", lambda one, other: False)

    def once(source, target):
        if str(source).endswith(".writing"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    assert f"error: {tmp_path / 'out'}: " in fails(*writer(base, adapter, tmp_path / "out"), "--force")


# The program.


@pytest.mark.parametrize("command", ["inspect", "merge", "convert", "diff"])
def test_every_command_has_an_example(run, command):
    status, out, err = run(command, "--help")
    assert status == 0 and err == "" and f"example: lora-jax {command} " in out


@pytest.mark.parametrize("command", ["", "inspect", "merge", "convert", "diff"])
def test_help_fits_the_terminal(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(*command.split(), "--help")
    assert status == 0 and max(map(len, out.splitlines())) <= 80


def test_the_examples_are_right(base, adapter, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "llama")
    shutil.copytree(adapter, "my-adapter")
    shutil.copytree(adapter, "before")
    shutil.copytree(adapter, "after")
    for command in ("inspect", "merge", "convert", "diff"):
        example = run(command, "--help")[1].rpartition("lora-jax ")[2].split()
        assert run(*example)[0] == 0, example


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "required: command"),
        ("unmerge", "'unmerge' (choose from 'inspect', 'merge', 'convert', 'diff', 'doctor')"),
        ("merge a", "required: ADAPTER, OUT; the form is lora-jax merge BASE ADAPTER OUT"),
        ("merge --base B", "required: ADAPTER, OUT; the form is lora-jax merge BASE ADAPTER OUT"),
        ("merge a b c d", "unrecognized arguments: d; the form is lora-jax merge BASE ADAPTER OUT"),
        ("inspect --bse B a", "unrecognized arguments: --bse a; the form is lora-jax inspect ADAPTER [--base BASE]"),
        ("convert a b --target", "expected one argument; the form is lora-jax convert ADAPTER OUT --target TARGET"),
        ("convert a b --target onnx", "'mlx'); the form is lora-jax convert ADAPTER OUT --target TARGET"),
        ("diff a", "required: OTHER; the form is lora-jax diff ADAPTER OTHER"),
    ],
)
def test_arguments_that_do_not_parse(run, args, message):
    status, out, err = run(*args.split())
    usage, error = err.rsplit("\n", 2)[:2]
    assert status == 2 and out == "" and usage.startswith("usage: lora-jax")
    assert error.startswith("lora-jax") and error.endswith(message), error


def test_as_a_module_and_as_a_program(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(lora.__file__).parents[1])}
    said = subprocess.run(
        [sys.executable, "-m", "lora_jax", "--help"], capture_output=True, text=True, env=environment, check=True
    )
    assert "inspect" in said.stdout and said.stderr == ""
    program = pathlib.Path(sys.executable).with_name("lora-jax")
    start = [str(program)] if program.exists() else [sys.executable, "-m", "lora_jax"]
    failed = subprocess.run([*start, "inspect", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
