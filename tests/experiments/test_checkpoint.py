"""Checkpoints in Hugging Face layout: what is read where, what is refused, what is written."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import bert, bert_names, checkpoint
from experiments.models.options import DEFAULT, Options
from lora_jax import peft
from tests.experiments.conftest import CONFIG, bert_tensors, write_model
from tests.experiments.encoders import tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def weights(model):
    return {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def write_shards(directory, arrays, config=CONFIG):
    """Every second tensor in a file of its own."""
    write_model(directory, {}, config)
    (directory / "model.safetensors").unlink()
    names, where = sorted(arrays), {}
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: arrays[name] for name in names[number::2]}, directory / file)
        where |= dict.fromkeys(names[number::2], file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    return directory


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for path, values in actual.items():
        np.testing.assert_array_equal(values, expected[path], err_msg=path)


def test_shards_are_one_model(tiny_model, tmp_path):
    write_shards(tmp_path, bert_tensors())
    assert_same(weights(bert.load(tmp_path)), weights(bert.load(tiny_model)))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_weights_are_read_once_straight_onto_their_shardings(tmp_path, mesh, monkeypatch, scan):
    config = CONFIG | {"num_hidden_layers": 2}
    write_shards(tmp_path, bert_tensors(config), config)
    usual = weights(bert.load(tmp_path, Options(scan=scan)))

    def sharding(path, shape):
        if not path.endswith("kernel"):
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*[None] * (len(shape) - 2), "x", "y" if "query" in path else None))

    read = []
    original = peft.Tensors.read

    def counted(tensors, name, part=None):
        values = original(tensors, name, part)
        read.append((name, values.nbytes))
        return values

    monkeypatch.setattr(peft.Tensors, "read", counted)
    placed = weights(bert.load(tmp_path, Options(scan=scan), sharding=sharding))
    assert_same(placed, usual)
    for path, values in placed.items():
        assert values.sharding.is_equivalent_to(sharding(path, values.shape), values.ndim), path
        assert len(values.sharding.device_set) == 8
    # a part is read once for all devices that share it
    assert sum(size for _, size in read) == sum(values.nbytes for values in usual.values())
    parts = {name: {size for other, size in read if other == name and size} for name, _ in read}
    assert parts["encoder.layer.1.attention.self.query.weight"] == {16 * 16 * 4 // 8}
    assert parts["encoder.layer.1.attention.self.key.weight"] == {16 * 16 * 4 // 2}
    assert parts["encoder.layer.1.attention.self.key.bias"] == {16 * 4}


def test_layers_of_a_scan_may_be_sharded(tmp_path, mesh):
    config = CONFIG | {"num_hidden_layers": 4}
    write_model(tmp_path, bert_tensors(config), config)

    def sharding(path, shape):
        return NamedSharding(mesh, P("y") if "/layers/" in path else P())

    placed = weights(bert.load(tmp_path, Options(scan=True), sharding=sharding))
    assert placed["encoder/layers/attention/query/kernel"].addressable_shards[0].data.shape == (1, 16, 16)
    assert_same(placed, weights(bert.load(tmp_path, Options(scan=True))))


def test_what_is_stored_in_bfloat16_stays(tmp_path):
    stored = {name: x.astype(ml_dtypes.bfloat16) for name, x in bert_tensors().items()}
    write_model(tmp_path / "given", stored)
    model = bert.load(tmp_path / "given", dtype=None)
    assert {x.dtype for x in weights(model).values()} == {jnp.dtype(jnp.bfloat16)}
    _, base = lora.nnx.functional(model)
    checkpoint.save(tmp_path / "written", base, bert_names.NAMES, CONFIG, bare=True)
    written = tensors(tmp_path / "written")
    assert written.keys() == stored.keys()
    assert all(written[name].tobytes() == x.tobytes() for name, x in stored.items())


def test_weights_are_cast_where_that_is_asked(tiny_model):
    assert {x.dtype for x in weights(bert.load(tiny_model, dtype=jnp.bfloat16)).values()} == {jnp.dtype(jnp.bfloat16)}


def test_all_misfits_are_named_at_once(tmp_path):
    stored = bert_tensors()
    stored["encoder.layer.7.surprise"] = np.zeros(3, np.float32)
    del stored["encoder.layer.0.attention.self.key.bias"], stored["embeddings.LayerNorm.weight"]
    stored["encoder.layer.0.output.dense.weight"] = np.zeros((16, 31), np.float32)
    write_shards(tmp_path, stored)
    for options in (DEFAULT, Options(scan=True)):
        with pytest.raises(UserError) as error:
            bert.load(tmp_path, options)
        assert str(error.value).splitlines()[1:] == [
            "  missing: embeddings.LayerNorm.weight (16,)",
            "  missing: encoder.layer.0.attention.self.key.bias (16,)",
            "  unexpected: encoder.layer.7.surprise (3,)",
            "  shape: encoder.layer.0.output.dense.weight is (16, 31), expected (16, 32)",
        ]


def test_two_spellings_of_one_weight_are_refused(tmp_path):
    stored = bert_tensors()
    write_model(tmp_path, stored | {"bert.embeddings.LayerNorm.gamma": stored["embeddings.LayerNorm.weight"]})
    with pytest.raises(UserError, match=r"LayerNorm\.\w+ and \S+LayerNorm\.\w+ are the same weight"):
        bert.load(tmp_path)


def test_a_missing_shard(tmp_path):
    write_shards(tmp_path, bert_tensors())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 2 shards missing: model-00002-of-00002"):
        bert.load(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 200, -4], ids=lambda size: f"{size} bytes")
def test_a_truncated_file(tmp_path, size):
    write_model(tmp_path, bert_tensors())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        bert.load(tmp_path)


def test_pickles_are_refused(tmp_path):
    write_model(tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code: convert it"):
        bert.load(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "deeper/model.safetensors"])
def test_an_index_stays_in_its_directory(tmp_path, file):
    write_shards(tmp_path, bert_tensors())
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="is not a file of this directory"):
        bert.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(tmp_path, content):
    write_shards(tmp_path, bert_tensors())
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=INDEX):
        bert.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX, "model-00001-of-00002.safetensors"])
def test_loops_of_links(tmp_path, file):
    (write_model if file == "model.safetensors" else write_shards)(tmp_path, bert_tensors())
    (tmp_path / file).unlink()
    os.symlink(tmp_path / "loop", tmp_path / file)
    os.symlink(tmp_path / file, tmp_path / "loop")
    with pytest.raises(UserError, match=str(tmp_path)):
        bert.load(tmp_path)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_what_is_written_in_shards_loads_the_same(tiny_model, tmp_path, scan):
    _, base = lora.nnx.functional(bert.load(tiny_model, Options(scan=scan)))
    target = tmp_path / "new" / "model"
    checkpoint.save(target, base, bert_names.NAMES, CONFIG, tokenizer=tiny_model, shard_bytes=4000)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 4000 + 2000 for file in files)
    assert set(json.loads((target / INDEX).read_text())["weight_map"].values()) == {file.name for file in files}
    assert checkpoint.read_config(target) == CONFIG
    assert (target / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert_same(weights(bert.load(target)), weights(bert.load(tiny_model)))
    assert tensors(target).keys() == {f"bert.{name}" for name in bert_tensors()}


def test_a_failed_write_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    _, base = lora.nnx.functional(bert.load(tiny_model))
    original = peft.write_model

    def full(*arguments, **keywords):
        original(*arguments, **keywords)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(peft, "write_model", full)
        with pytest.raises(UserError, match=r"target: cannot be written \(no space left"):
            checkpoint.save(tmp_path / "target", base, bert_names.NAMES, CONFIG)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "target", base, bert_names.NAMES, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_nothing_is_overwritten(tiny_model, tmp_path):
    _, base = lora.nnx.functional(bert.load(tiny_model))
    (tmp_path / "empty").mkdir()
    checkpoint.save(tmp_path / "empty", base, bert_names.NAMES, CONFIG)
    for target in (tmp_path / "empty", tmp_path / "empty" / "config.json"):
        with pytest.raises(UserError, match="holds files already"):
            checkpoint.save(target, base, bert_names.NAMES, CONFIG)


def test_parameters_without_a_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="no name is declared for 'surprise'"):
        checkpoint.save(tmp_path / "target", {"surprise": jnp.zeros(3)}, bert_names.NAMES, CONFIG)
    assert not list(tmp_path.iterdir())
