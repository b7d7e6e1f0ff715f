"""GGUF files of every family, which llama.cpp's converter made from the stored decoders."""

import dataclasses
import fnmatch
import shutil

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import checkpoint, families, location
from experiments.models.options import Options
from experiments.models.weights import flatten_weights
from experiments.pretrained.gguf.rope import llama3_scaling
from tests.experiments import gguf_files
from tests.experiments.decoders import ALL, FIXTURES

SCANNED = Options(scan=True)
F32 = gguf.GGMLQuantizationType.F32


def family(path):
    return families.get_family(checkpoint.read_config(path))


def weights(path, options=SCANNED, **loading):
    return flatten_weights(lora.nnx.functional(family(path).load(path, options, **loading))[1])


def check_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, weight in expected.items():
        assert weight.dtype == actual[path].dtype and np.array_equal(weight, actual[path]), path


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [SCANNED, Options()], ids=["scanned", "unrolled"])
def test_weights_are_those_of_the_checkpoint_bit_for_bit(name, options):
    check_equal(weights(gguf_files.FILES / f"{name}.gguf", options), weights(FIXTURES / name, options))


@pytest.mark.parametrize("name", ALL)
def test_shapes_are_those_of_the_checkpoint(name):
    shapes = [family(path).shape(checkpoint.read_config(path)) for path in paths(name)]
    if name in ("mistral", "qwen2"):  # llama.cpp has no sliding window for them
        shapes[1] = dataclasses.replace(shapes[1], sliding=(False,) * len(shapes[1].sliding), sliding_window=0)
        shapes[0] = dataclasses.replace(shapes[0], sliding_window=0)
    assert shapes[0] == shapes[1]


def paths(name):
    return gguf_files.FILES / f"{name}.gguf", FIXTURES / name


@pytest.mark.parametrize(("name", "dtype"), [("llama_f16", np.float16), ("llama_bf16", ml_dtypes.bfloat16)])
def test_halves_load_as_they_are(name, dtype):
    path, expected = gguf_files.FILES / f"{name}.gguf", weights(FIXTURES / "llama")
    is_matrix = {key: key.endswith(("kernel", "embedding")) for key in expected}
    expected = {
        key: np.asarray(array).astype(dtype if is_matrix[key] else np.float32) for key, array in expected.items()
    }
    check_equal(weights(path, dtype=None), expected)
    check_equal(weights(path), {key: array.astype(np.float32) for key, array in expected.items()})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *gguf_files.SCALES)),
        ("gpt2", "Q4_K"),
        ("mixtral", "Q6_K"),
    ],
)
def test_codes_are_dequantized(name, kind, tmp_path):
    """Bit for bit as by the `gguf` package, which made the numbers of the other file."""
    path, plain = gguf_files.widen(tmp_path, kind, name)
    expected = weights(plain)
    check_equal(weights(path), expected)
    half = weights(path, dtype=jnp.bfloat16)
    assert all(array.dtype == jnp.bfloat16 for array in half.values())


def test_older_and_newer_forms_of_tensors(tmp_path):
    """A tensor for each expert, a copy of the head, and the fused tensors of the converter's options."""
    fields, tensors = gguf_files.read(gguf_files.FILES / "mixtral.gguf")
    single, fused = dict(tensors), dict(tensors)
    for layer in range(2):
        for name in ("gate", "up", "down"):
            data, kind = single.pop(f"blk.{layer}.ffn_{name}_exps.weight")
            single |= {f"blk.{layer}.ffn_{name}.{number}.weight": (part, kind) for number, part in enumerate(data)}
        gate, up = (fused.pop(f"blk.{layer}.ffn_{name}_exps.weight")[0] for name in ("gate", "up"))
        fused[f"blk.{layer}.ffn_gate_up_exps.weight"] = (np.concatenate([gate, up], axis=1), F32)
        qkv = [fused.pop(f"blk.{layer}.attn_{name}.weight")[0] for name in "qkv"]
        fused[f"blk.{layer}.attn_qkv.weight"] = (np.concatenate(qkv), F32)
    expected = weights(FIXTURES / "mixtral")
    for number, changed in enumerate((single, fused)):
        check_equal(weights(gguf_files.write(tmp_path / f"{number}.gguf", fields, changed)), expected)
    fields, tensors = gguf_files.read(gguf_files.FILES / "gpt2.gguf")
    tensors["output.weight"] = tensors["token_embd.weight"]
    path = gguf_files.write(tmp_path / "gpt2.gguf", fields, tensors)
    check_equal(weights(path), weights(FIXTURES / "gpt2"))


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
@pytest.mark.parametrize("width", [8, 16, 64, 128])
@pytest.mark.parametrize(("factor", "low", "high", "length"), [(8.0, 1, 4, 8192), (32.0, 1, 4, 64), (4.0, 2, 16, 64)])
def test_factors_of_llama3_are_explained(theta, width, factor, low, high, length):
    """As the converter computes them."""
    rotations = length * theta ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
    weight = np.clip((rotations - low) / (high - low), 0, 1)
    factors = (1 / (weight + (1 - weight) / factor)).astype(np.float32)
    if np.all(factors == 1):
        with pytest.raises(ValueError, match="with some above 1"):
            llama3_scaling(factors, theta, width)
        return
    scaling = llama3_scaling(factors, theta, width)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    rotations *= scaling["original_max_position_embeddings"] / length
    weight = np.clip((rotations - low) / (high - low), 0, 1)
    np.testing.assert_allclose(1 / (weight + (1 - weight) / factor), factors, rtol=1e-4)


def test_directories_and_parts(tmp_path):
    path = shutil.copyfile(gguf_files.FILES / "llama.gguf", tmp_path / "model.gguf")
    assert location.find(str(tmp_path)) == location.find(str(path)) == path
    check_equal(weights(tmp_path), weights(FIXTURES / "llama"))
    fields, tensors = gguf_files.read(path)
    path.unlink()
    for number, names in enumerate((sorted(tensors)[:5], sorted(tensors)[5:])):
        part = tmp_path / f"model-{number + 1:05}-of-00002.gguf"
        chosen = fields if number == 0 else {"general.architecture": fields["general.architecture"]}
        gguf_files.write(part, chosen, {name: tensors[name] for name in names})
    check_equal(weights(tmp_path), weights(FIXTURES / "llama"))
    check_equal(weights(part), weights(FIXTURES / "llama"))


class Hub:
    """A stand-in for the hub: repositories are directories, and only named files are downloaded."""

    def __init__(self, directory, monkeypatch):
        self._repositories, self._cache = directory / "hub", directory / "cache"
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: [f.name for f in self._files(name)])
        monkeypatch.setattr("huggingface_hub.snapshot_download", self._download)

    def add(self, name, *files):
        (self._repositories / name).mkdir(parents=True)
        for file in files:
            (self._repositories / name / file).write_bytes(b"")

    def _files(self, name):
        return sorted((self._repositories / name).iterdir())

    def _download(self, name, allow_patterns):
        directory = self._cache / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in self._files(name):
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, directory)
        return str(directory)


def test_models_of_the_hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path, monkeypatch)
    hub.add("one/one-GGUF", "config.json", "model.gguf", "README.md")
    hub.add("one/both", "config.json", "model.safetensors", "model.gguf")
    hub.add("one/many", "a-q4_0.gguf", "a-q8_0-00001-of-00002.gguf", "a-q8_0-00002-of-00002.gguf")
    assert location.find("one/one-GGUF") == tmp_path / "cache/one/one-GGUF/model.gguf"
    assert not (tmp_path / "cache/one/one-GGUF/README.md").exists()
    assert location.find("one/both") == tmp_path / "cache/one/both"
    assert not (tmp_path / "cache/one/both/model.gguf").exists()
    listed = "one/many/a-q4_0.gguf, one/many/a-q8_0-00001-of-00002.gguf"
    with pytest.raises(UserError, match=f"^one/many: holds 2 models, name one of them: {listed}$"):
        location.find("one/many")
    path = location.find("one/many/a-q8_0-00001-of-00002.gguf")
    assert [file.name for file in sorted(path.parent.iterdir())] == [path.name, "a-q8_0-00002-of-00002.gguf"]
    with pytest.raises(UserError, match=r"^one/many: has no file b\.gguf on the hub$"):
        location.find("one/many/b.gguf")
    for name in ("a.gguf", "one/b.gguf", "./one/many/a.gguf", "/one/many/a.gguf", "~/one/many/a.gguf"):
        with pytest.raises(UserError, match="no such file"):
            location.find(name)
