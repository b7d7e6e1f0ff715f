"""Safetensors files: reading, rewriting, shards and their index."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax.peft.rewriting import rewrite
from lora_jax.peft.tensor_files import write_model, write_tensors
from lora_jax.peft.tensors import Tensors, check_index, model_files, read_json

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4).astype(ml_dtypes.bfloat16),
    "n": np.array(3, np.int64),
    "e": np.zeros((0, 2), np.float16),
}


@pytest.fixture
def file(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_names_shapes_and_values(file):
    with Tensors([file]) as tensors:
        assert dict(tensors) == {name: value.shape for name, value in ARRAYS.items()}
        for name, value in ARRAYS.items():
            read = tensors.read(name)
            assert read.dtype == value.dtype and read.tobytes() == value.tobytes()
        np.testing.assert_array_equal(tensors.read("b", (slice(1, 2), slice(0, 2))), [[3, 4]])
        assert (tensors.dtype("a"), tensors.file_of("a")) == ("BF16", file)
    assert not tensors


def test_a_dtype_that_numpy_does_not_have(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with Tensors([tmp_path / "w.safetensors"]) as tensors, pytest.raises(ValueError, match="'w' of dtype F8_E8M0"):
        tensors.read("w")


def test_a_name_in_two_files(file, tmp_path):
    save_file({"a": np.ones(1)}, tmp_path / "other.safetensors")
    with (
        pytest.raises(ValueError, match=r"other\.safetensors: 'a' is also in another file"),
        Tensors([file, tmp_path / "other.safetensors"]),
    ):
        pass


@pytest.mark.parametrize("changed", [(), ("b",), ("a", "n"), tuple(ARRAYS)])
def test_rewrite(file, tmp_path, changed):
    sizes = []
    new = {name: (value + 1).astype(value.dtype) for name, value in ARRAYS.items()}
    rewrite(file, tmp_path / "new", lambda name: new[name] if name in changed else None, sizes.append)
    for name, value in load_file(tmp_path / "new").items():
        expected = new[name] if name in changed else ARRAYS[name]
        assert (value.dtype, value.shape, value.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    assert sum(sizes) == sum(value.nbytes for value in ARRAYS.values())


def test_rewrite_keeps_metadata(tmp_path):
    save_file({"w": np.ones(2)}, tmp_path / "old", metadata={"made": "by us", "format": "np"})
    rewrite(tmp_path / "old", tmp_path / "new", lambda name: None)
    content = (tmp_path / "new").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert json.loads(content[8 : 8 + length])["__metadata__"] == {"made": "by us", "format": "np"} and length % 8 == 0


def test_rewrite_refuses_another_size(file, tmp_path):
    with pytest.raises(ValueError, match="'b'"):
        rewrite(file, tmp_path / "new", lambda name: np.ones(9, np.float32) if name == "b" else None)


@pytest.mark.parametrize("shard_bytes, count", [(10**6, 1), (60, 2), (1, 5)])
def test_written_in_shards(tmp_path, shard_bytes, count):
    arrays = {f"layers.{i}": np.full(6, i, np.float32) for i in range(5)}
    files = write_model(tmp_path, iter(arrays.items()), shard_bytes=shard_bytes)
    if count == 1:
        assert [file.name for file in files] == ["model.safetensors"]
    assert model_files(tmp_path) == sorted(files)
    with Tensors(files) as tensors:
        check_index(tensors)
        assert {name: tensors.read(name)[0] for name in tensors} == {f"layers.{i}": i for i in range(5)}


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "JSON"),
        ("[]", "list"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"w": 3}}', "weight_map"),
        ('{"weight_map": {"w": "../w.safetensors"}}', "'../w.safetensors' is not a file of this directory"),
        ('{"weight_map": {"w": ".."}}', "is not a file of this directory"),
        ('{"weight_map": {"w": "sub/w.safetensors"}}', "is not a file of this directory"),
        ('{"weight_map": {"w": "w.safetensors"}}', "1 of 1 shards missing: w.safetensors"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, content, said):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        model_files(tmp_path)


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        model_files(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        model_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"null"])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "nowhere" / "w.safetensors", {"w": np.ones(2)})
    assert caught.value.errno


def test_written_files_are_the_same_bytes(tmp_path):
    """Safetensors orders metadata by a hash that differs from one map to the next."""
    for number in range(20):
        write_tensors(tmp_path / str(number), {"w": np.arange(3.0)}, {"ä": "1", "b": "\n"})
    assert len({(tmp_path / str(number)).read_bytes() for number in range(20)}) == 1
    with safe_open(tmp_path / "0", "numpy") as opened:
        assert opened.metadata() == {"format": "pt", "written_by": "lora_jax", "ä": "1", "b": "\n"}
        assert opened.get_tensor("w").tolist() == [0, 1, 2]
