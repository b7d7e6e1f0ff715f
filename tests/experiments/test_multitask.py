"""One base and many tasks end to end on a tiny model: joint and separate training, one batch, resuming."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments import run as entry
from experiments.configs.multitask import Config
from experiments.errors import UserError
from experiments.studies.multitask import problems, study, training
from experiments.studies.multitask.training import Streams
from experiments.studies.problem import accuracy, answers
from experiments.training.stream import Stream

pytestmark = pytest.mark.usefixtures("lenient")

WORDS = ("chess", "mail", "sound", "server", "editor", "library")


@pytest.fixture(scope="module")
def settings(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fields")
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 16), ("test", 20)):
        rows = ["topic\tside\tsource\ttext"]
        for number in range(count):
            topic, side = WORDS[number % 3], WORDS[3 + number % 2]
            words = rng.permutation([topic, side, "a", "the"])
            rows.append(f"{topic}\t{side if number % 5 else ''}\tsource{number}\t{' '.join(words)}")
        (directory / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return Config(
        model=str(tiny_model),
        data=str(directory),
        train_examples=24,
        validation_examples=8,
        test_examples=10,
        batch_size=8,
        length=8,
        rank=2,
        rows=4,
        repeats=1,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, study.run(config)


def test_every_method_has_a_result_for_each_task(finished):
    config, results = finished
    assert [task.name for task in results.tasks] == ["topic", "side"]
    assert [task.labels for task in results.tasks] == [3, 2]
    assert {len(task.problem.names) for task in results.tasks} == {3}
    record = json.loads((config.out / "run.json").read_text())
    assert [row["adapter"] for row in record["tasks"]] == [outcome.test_accuracy for outcome in results.adapters]
    assert all(row["full_bytes"] > row["adapter_bytes"] for row in record["tasks"])
    page = (config.out / "README.md").read_text()
    assert "| mean |" in page and "| bytes, base included |" in page
    assert (config.out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_one_batch_equals_separate_calls(finished):
    _, results = finished
    assert results.served.difference < 1e-4 and results.served.agreement == 1
    assert results.served.together > 0 and results.served.separately > 0


def test_a_stored_adapter_has_the_reported_accuracy(finished):
    config, results = finished
    for task, outcome in zip(results.tasks, results.adapters):
        (path,) = config.out.glob(f"adapter-{task.name}-*/adapter")
        params = lora.merge(task.problem.base, lora.load(path, task.problem.base))
        apply, split = jax.jit(task.problem.apply), task.problem.splits["test"]
        logits = answers(lambda *inputs: apply(params, *inputs)[0], split, task.problem.lengths)  # noqa: B023
        assert accuracy(logits, split) == outcome.test_accuracy


def test_a_member_trains_on_the_batches_of_its_task(settings):
    tasks = problems.load(settings, str)
    parts = [task.problem.splits["train"] for task in tasks]
    streams = [Stream(part.sequences, part.labels, (settings.length,), 8, 0) for part in parts]
    batch = Streams(streams).rows(1, slice(2, 5))
    for index, stream in enumerate(streams):
        for name, rows in stream.rows(1, slice(2, 5)).items():
            np.testing.assert_array_equal(batch[name][index], rows)
    assert Streams(streams).examples(0) == 16


def test_an_interrupted_run_resumes(settings, finished, tmp_path, monkeypatch, interrupt_many_at, capsys):
    config = dataclasses.replace(settings, out=tmp_path)
    interrupt_many_at(1, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        study.run(config)
    results = study.run(config)
    assert "resumed at step 2 of 6" in capsys.readouterr().out
    for one, other in zip(results.adapters, finished[1].adapters):
        assert one.test_accuracy == other.test_accuracy
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert study.run(config).adapters == results.adapters
    with pytest.raises(pytest.fail.Exception):
        study.run(dataclasses.replace(config, clip=0.5))


def test_a_diverged_task_is_an_error(settings, tmp_path, monkeypatch):
    real = lora.train_many

    def poisoned(*args, **kwargs):
        step = real(*args, **kwargs)

        def stepping(states, batch):
            states, metrics = step(states, batch)
            return states, metrics | {"loss": metrics["loss"].at[1].set(np.nan)}

        return stepping

    monkeypatch.setattr(lora, "train_many", poisoned)
    with pytest.raises(UserError, match="the adapters of side diverged; try a smaller --lr"):
        study.run(dataclasses.replace(settings, out=tmp_path))


def test_what_the_user_can_put_right_is_one_sentence(settings, tmp_path, capsys):
    flags = ["--model", settings.model, "--data", settings.data, "--out", str(tmp_path), "--test-examples", "10"]
    flags += ["--train-examples", "24", "--validation-examples", "8"]
    for more, message in (
        (["--length", "2"], "length must be at least 3"),
        (["--tasks", "3"], "has 2 tasks, fewer than 3"),
        (["--length", "9999"], "has only"),
    ):
        assert entry.main(["multitask", *flags, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
