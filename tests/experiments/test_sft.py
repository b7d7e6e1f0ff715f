"""Supervised fine-tuning: on conversations in the checkpoint's own words, on one device and on meshes of eight."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import lora_jax as lora
from experiments import run
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.errors import Preempted, UserError
from experiments.models import families, location
from experiments.studies.decoder.program import read_description
from experiments.studies.sft import program, study
from experiments.training import mesh as meshes
from experiments.training import record
from experiments.training.interrupt import Interrupt
from experiments.training.mesh import MeshSizes
from tests.experiments.sft_runs import TINY, adapters_equal

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {% generation %}{{ message.content }}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
"""Which teaches all that is said, users' words too: a template of the checkpoint's own is what counts."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Conversations, and a tiny Llama with a chat template of its own."""
    directory = tmp_path_factory.mktemp("sft")
    shutil.copytree(location.find("tiny-llama"), directory / "model")
    (directory / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (directory / "data").mkdir()
    for split, count in (("train", 24), ("validation", 6)):
        messages = [
            [
                {"role": "user", "content": f"What is {i} and {i}?"},
                {"role": "assistant", "content": f"That is {2 * i}, a number."},
            ]
            for i in range(count)
        ]
        lines = [json.dumps({"messages": one}) + "\n" for one in messages]
        (directory / "data" / f"{split}.jsonl").write_text("".join(lines))
    return Config(
        model=str(directory / "model"),
        data=str(directory / "data"),
        out=directory / "out",
        length=64,
        batch=BatchSizes(8, accumulate=2),
        epochs=4,
        rank=2,
        lr=1e-3,
        samples=2,
        new_tokens=6,
        checkpoint_every=5,
    )


@pytest.fixture(scope="module")
def finished(settings):
    with jax.numpy_dtype_promotion("standard"):
        return settings, study.run(settings)


def scalars(directory, tag):
    """The values of a tag in a directory's one file of events: records of a length, a checksum, data, a checksum."""
    (path,) = directory.iterdir()
    content, values = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        values += [value.simple_value for value in event.summary.value if value.tag == tag]
        content = content[16 + size :]
    return values


def test_what_is_written(finished):
    config, report = finished
    assert np.mean(report.losses[-2:]) < np.mean(report.losses[:2])
    assert report.evaluations[0][0] == 0 and report.evaluations[-1][0] == len(report.losses)
    assert report.evaluations[-1][1] < report.evaluations[0][1]
    prompt, before, after, answer = report.texts[1]
    assert prompt == "<user> What is 1 and 1?<assistant>" and answer == "That is 2, a number."
    assert before != after
    config_json = json.loads((config.out / record.CONFIG).read_text())
    assert config_json["batch"] == {"global_": 8, "accumulate": 2} and config_json["mesh"]["fsdp"] == 1
    lines = record.read(config.out / record.METRICS)
    steps = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in steps] == report.losses
    assert all(line["tokens_per_second"] > 0 and line["host_bytes"] > 1e8 and "mfu" not in line for line in steps)
    assert [(line["step"], line["validation"]) for line in lines if "validation" in line] == report.evaluations[1:]
    np.testing.assert_allclose(scalars(config.out / "tensorboard", "loss"), report.losses, rtol=1e-6)
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_in_both_formats(finished, lenient):
    config, report = finished
    adapter, parts = lora.load(config.out / study.ADAPTER), program.abstract(config)
    base = parts.load(Path(config.model))
    again = lora.peft.load(config.out / study.PEFT, base, parts.family.names(parts.shape))
    for path in adapter:
        for name in ("a", "b", "scale"):
            np.testing.assert_array_equal(getattr(adapter[path], name), getattr(again[path], name))
    assert report.best_step == len(report.losses)
    adapters_equal(adapter, lora.load(config.out / study.BEST))


def test_a_finished_run_is_shown(finished, monkeypatch, lenient):
    config, report = finished
    monkeypatch.setattr(study.loop, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert study.run(config) == report
    # What does not decide the numbers may differ; what does is refused.
    study.run(dataclasses.replace(config, mesh=MeshSizes(data=4), samples=1))
    with pytest.raises(UserError, match=r"a finished run with alpha 32\.0, not 16\.0; --fresh starts over"):
        study.run(dataclasses.replace(config, alpha=16.0))


MESHES = {
    "all axes": MeshSizes(data=2, fsdp=2, tensor=2),
    "sequences": MeshSizes(fsdp=2, tensor=2, sequence=True),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_train_as_one_device(settings, finished, tmp_path, name, lenient):
    report = study.run(dataclasses.replace(settings, out=tmp_path, mesh=MESHES[name], profile="2:9"))
    np.testing.assert_allclose(report.losses, finished[1].losses, rtol=1e-5)
    np.testing.assert_allclose(report.evaluations, finished[1].evaluations, rtol=1e-5)
    assert report.texts == finished[1].texts
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", MESHES)
def test_logits_where_there_are_labels_on_a_mesh(settings, name, lenient):
    config = dataclasses.replace(settings, mesh=MESHES[name])
    bounded, unbounded = (program.abstract(config, max_labels=count) for count in (8, None))
    mesh = bounded.mesh
    labels = np.full((8, config.length), -1, np.int32)
    labels[:, 3], labels[:7, 50:57] = 5, 7
    batch = {name: np.ones_like(labels) for name in ("tokens", "segments", "positions")} | {"labels": labels}
    with jax.set_mesh(mesh):
        base = bounded.load(Path(config.model))
        delta = bounded.create(jax.random.key(0), base).delta
        train, frozen = lora.partition(delta)
        train = jax.tree.map(lambda x: x + 0.1, train)  # factors of zero have no gradients

        def mean(train, program):
            total, count = program.loss(base, lora.join(train, frozen), meshes.put_batch(mesh, batch, 8), None)
            return total / count

        values = jax.jit(lambda train: [jax.value_and_grad(mean)(train, parts) for parts in (bounded, unbounded)])
        one, other = values(train)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_a_quantized_base_on_a_mesh(settings, finished, tmp_path, lenient):
    mesh = MeshSizes(data=4)
    report = study.run(dataclasses.replace(settings, out=tmp_path, mesh=mesh, quantize="nf4", samples=0))
    assert report.losses != finished[1].losses
    np.testing.assert_allclose(report.losses, finished[1].losses, rtol=0.02)


def test_a_trace_of_a_run_that_resumes(settings, tmp_path, monkeypatch, lenient):
    config = dataclasses.replace(settings, out=tmp_path, samples=0, steps=5, profile="2:4", batch=BatchSizes(8))
    requests = iter([False, False, True])
    monkeypatch.setattr(Interrupt, "requested", lambda self, step: next(requests, False))
    with pytest.raises(Preempted, match="at step 3: saved"):
        study.run(config)
    assert len(study.run(config).losses) == 5
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 2


def test_another_config_is_refused_on_resuming(settings, tmp_path, monkeypatch, lenient):
    config = dataclasses.replace(settings, out=tmp_path, samples=0, steps=3, batch=BatchSizes(8))
    monkeypatch.setattr(Interrupt, "requested", lambda self, step: step == 2)
    with pytest.raises(Preempted):
        study.run(config)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 was made with lr 0\.001, not 0\.002; --fresh"):
        study.run(dataclasses.replace(config, lr=2e-3))


def test_data_without_validation(settings, tmp_path, lenient):
    data = f"{settings.data[0]}/train.jsonl"
    config = dataclasses.replace(settings, out=tmp_path, data=data, steps=2, samples=1, batch=BatchSizes(8))
    report = study.run(config)
    assert report.evaluations == [] and len(report.losses) == 2 and len(report.texts) == 1
    assert (tmp_path / study.BEST).is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh.data", "3"], "batch.global 8 cannot be divided over a mesh of data 3 × fsdp 1 × tensor 1; nearest"),
        (["--mesh.fsdp", "16"], "has 16 devices, here are 8; mesh.fsdp 8 fits"),
        (["--batch.global", "6", "--batch.accumulate", "4"], "in 4 microbatches; nearest that can: 4 and 8"),
        (["--mesh.tensor", "4"], "mesh.tensor 4 does not divide the 2 key heads of tiny-llama; use one of 1, 2"),
        (["--mesh.tensor", "2", "--mesh.sequence", "--length", "33"], "length 33 is not divisible by mesh.tensor 2"),
        (["--mesh.sequence"], "mesh.tensor is 1"),
        (["--mesh.fsdp", "2", "--quantize", "nf4"], "quantize nf4: "),
        (["--targets", "head", "--model", "tiny-gpt2"], "targets head: the head of tiny-gpt2 is its token embedding"),
        (
            ["--model", "tiny-gpt2", "--length", "1000"],
            "length 1,000: tiny-gpt2 supports sequences of up to 128",
        ),
        (["--model", "tiny-gpt2", "--new-tokens", "500"], "--new-tokens 500: prompt and answer have"),
        (["--out", "gs://bucket/runs"], "out gs:/bucket/runs: expected a directory"),
        (["--profile", "5"], "profile must be FIRST:LAST"),
        (["--rank", "1000"], "--targets attention feed-forward: "),
    ],
)
def test_what_a_user_can_put_right(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    sizes = ["--length", "128", "--batch.global", "8", "--train-examples", "8"]
    assert run.main(["sft", *TINY, *sizes, "--out", str(tmp_path), "--samples", "1", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_family_has_names_and_axes():
    for model in ("tiny-llama", "tiny-gpt2", "Mixtral-8x7B-v0.1"):
        family = families.get_family(read_description(model))
        assert family.axes and family.names(family.shape(read_description(model)))
    with pytest.raises(UserError, match="model_type is 'lama'; did you mean llama"):
        families.get_family({"model_type": "lama"})
