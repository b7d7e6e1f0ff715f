"""Meshes from a config: what lies where, and what is refused with the nearest values that fit."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.models import bert, gpt2, llama
from experiments.training import loop, record
from experiments.training import mesh as meshes
from experiments.training.mesh import MeshSizes
from experiments.training.meter import Meter
from experiments.training.run import Costs, History, TrainingRun
from experiments.training.runtime import Runtime


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(MeshSizes(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("axes", "path", "shape", "spec"),
    [
        (llama.AXES, "layers/attention/query/kernel", (3, 8, 4), (None, "fsdp", "tensor")),
        (llama.AXES, "layers/0/attention/output/kernel", (4, 8), ("tensor", "fsdp")),
        (llama.AXES, "layers/feed_forward/down/kernel", (3, 4, 8), (None, "tensor", "fsdp")),
        (llama.AXES, "token/embedding", (10, 8), ("tensor", "fsdp")),
        (llama.AXES, "token/embedding", (11, 8), (None, "fsdp")),  # a vocabulary that cannot be divided is whole
        (llama.AXES, "layers/attention_norm/scale", (3, 8), (None, None)),
        (gpt2.AXES, "layers/attention/qkv/kernel", (3, 8, 12), (None, "fsdp", None)),
        (bert.AXES, "encoder/encoder/layers/feed_forward/up/bias", (3, 6), (None, "tensor")),
    ],
)
def test_where_a_weight_lies(mesh, axes, path, shape, spec):
    assert tuple(meshes.weight_shardings(mesh, axes)(path, shape).spec) == spec


def test_what_does_not_divide_is_told_with_what_does(mesh):
    with pytest.raises(UserError, match=r"mesh\.tensor 2 does not divide heads, which is 5 in .*query/kernel.*: 1, 5"):
        meshes.weight_shardings(mesh, llama.AXES)("layers/attention/query/kernel", (8, 5))
    with pytest.raises(UserError, match=r"here are 8; mesh\.data 4 fits or mesh\.tensor 1 fits"):
        meshes.make_mesh(MeshSizes(data=8, tensor=2))
    with pytest.raises(UserError, match="choose sizes whose product is 8"):
        meshes.make_mesh(MeshSizes(data=3, fsdp=3, tensor=3))
    with pytest.raises(UserError, match=r"batch\.global 10 cannot be divided .* nearest that can: 8 and 12"):
        meshes.check_batch(10, MeshSizes(data=2, fsdp=2), "batch.global")
    with pytest.raises(UserError, match=r"batch\.global 1 cannot be divided .* nearest that can: 8$"):
        meshes.check_batch(1, MeshSizes(data=8), "batch.global")
    with pytest.raises(ValueError, match=r"mesh\.fsdp must be positive, not 0"):
        MeshSizes(fsdp=0)


def test_fewer_devices_than_there_are():
    assert meshes.make_mesh(MeshSizes(data=3)).size == 3


def test_a_batch_lies_on_the_mesh(mesh):
    batch = {"tokens": np.arange(32).reshape(8, 4)}
    placed = meshes.put_batch(mesh, batch, 8)["tokens"]
    np.testing.assert_array_equal(placed, batch["tokens"])
    assert placed.sharding.shard_shape(placed.shape) == (2, 4)
    assert meshes.process_rows(mesh, 8) == slice(0, 8)
    np.testing.assert_array_equal(meshes.gather(placed), batch["tokens"])
    assert meshes.shard_examples(mesh, np.ones((3, 2))).shape == (3, 2)  # as it is


@pytest.mark.parametrize(
    ("epochs", "steps", "limit", "total", "due"),
    [
        (1, 10, None, 10, {5, 10}),
        (3, 10, None, 30, {10, 20, 30}),
        (3, 10, 14, 14, {10, 14}),
        (3, 10, 4, 4, {2, 4}),
        (1, 1, None, 1, {1}),
    ],
)
def test_when_to_evaluate(epochs, steps, limit, total, due):
    assert loop.plan_steps(epochs, steps, limit) == (total, due)


@pytest.mark.parametrize(("text", "steps"), [(None, []), ("10:12", [10, 11, 12]), ("3:3", [3])])
def test_steps_to_trace(text, steps):
    assert list(Runtime(profile=text).profiled_steps()) == steps


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b"])
def test_no_steps_to_trace(text):
    with pytest.raises(ValueError, match="FIRST:LAST"):
        Runtime(profile=text)


def test_a_record_goes_on_from_a_step(tmp_path):
    with record.Record(tmp_path, {"lr": 1}) as log:
        for step in range(1, 6):
            log.write(step, loss=1.0 / step, mfu=None)
    with (tmp_path / record.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # a process that was killed
    with record.Record(tmp_path, {"lr": 2}, step=3) as log:
        log.write(4, loss=0.5)
    lines = record.read(tmp_path / record.METRICS)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1] == {"step": 4, "loss": 0.5}
    assert json.loads((tmp_path / record.CONFIG).read_text()) == {"lr": 2}


def test_the_share_of_the_arithmetic(tmp_path):
    """The head counts for tokens with a label only."""
    costs = Costs(token_flops=6.0, label_flops=40.0, peak=100.0)
    run = TrainingRun(tmp_path, meshes.make_mesh(MeshSizes()), {}, 1, costs=costs)
    with record.Record(tmp_path, {}) as log:
        meter = Meter(run, History(), log)
        meter.add(1, {"loss": jax.numpy.float32(1), "grad_norm": jax.numpy.float32(1)}, tokens=50, labels=5)
        meter.settle()
    (line,) = record.read(tmp_path / record.METRICS)
    assert line["mfu"] == pytest.approx((6.0 + 40.0 / 10) * line["tokens_per_second"] / 100.0)
    assert line["labels_per_second"] == pytest.approx(line["tokens_per_second"] / 10)
    assert dataclasses.asdict(History(evaluations=[[1, 0.5]]))["evaluations"] == [(1, 0.5)]
