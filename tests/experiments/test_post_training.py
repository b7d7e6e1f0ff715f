"""Post-training: preferences, on one device and on a mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments.configs import dpo as dpo_config
from experiments.configs.decoder import BatchSizes
from experiments.errors import Preempted
from experiments.models import location
from experiments.studies.post_training import dpo
from experiments.studies.post_training.report import Report, change, verdict
from experiments.studies.post_training.task import Aim
from experiments.training.interrupt import Interrupt
from experiments.training.mesh import MeshSizes
from tests.experiments.sft_runs import adapters_equal


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama, preferences for words over numbers and answers with labels."""
    directory = tmp_path_factory.mktemp("post_training")
    shutil.copytree(location.find("tiny-llama"), directory / "model")
    for split, count in (("train", 16), ("validation", 6)):
        prompts = [f"Package {i}:" for i in range(count)]
        pairs = [{"prompt": p, "chosen": " a game", "rejected": f" {i} {i}"} for i, p in enumerate(prompts)]
        rated = [
            {"prompt": p, "completion": " a game" if i % 2 else " 7 7", "label": bool(i % 2)}
            for i, p in enumerate(prompts)
        ]
        write(directory / "pairs" / f"{split}.jsonl", pairs)
        write(directory / "rated" / f"{split}.jsonl", rated)
    return directory


@pytest.fixture(scope="module")
def preferences(directory):
    return dpo_config.Config(
        model=str(directory / "model"),
        data=str(directory / "pairs"),
        out=directory / "dpo",
        batch=BatchSizes(4),
        epochs=3,
        steps=None,
        rank=2,
        lr=2e-2,
        checkpoint_every=3,
    )


@pytest.fixture(scope="module")
def finished(preferences):
    with jax.numpy_dtype_promotion("standard"):
        return dpo.run(preferences)


def test_preferences_are_learned(preferences, finished):
    first, last = finished.losses[0], finished.losses[-1]
    assert first == pytest.approx(np.log(2), abs=1e-6) and last < first / 2
    assert np.mean(finished.after[dpo.ACCURACY]) == 1 and len(finished.after[dpo.ACCURACY]) == 6
    assert set(finished.before["chosen answer has the larger reward"]) == {0.5}
    value, error = change(finished, "margin of rewards")
    assert value > 1 > error > 0
    np.testing.assert_allclose(finished.means["accuracy"][-4:], 1)
    assert Report.load(preferences.out / "result.json") == finished
    assert (preferences.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert lora.load(preferences.out / "adapter").keys()


def test_a_run_of_preferences_resumes_bit_for_bit(preferences, finished, tmp_path, monkeypatch, lenient):
    config = dataclasses.replace(preferences, out=tmp_path)
    monkeypatch.setattr(Interrupt, "requested", lambda self, step: step == 5)
    with pytest.raises(Preempted, match="at step 5: saved"):
        dpo.run(config)
    monkeypatch.undo()
    report = dpo.run(config)
    assert (report.losses, report.means, report.after) == (finished.losses, finished.means, finished.after)
    adapters_equal(lora.load(tmp_path / "adapter"), lora.load(preferences.out / "adapter"))


def test_a_mesh_learns_the_same_preferences(preferences, finished, tmp_path, lenient):
    report = dpo.run(dataclasses.replace(preferences, out=tmp_path, mesh=MeshSizes(data=2)))
    np.testing.assert_allclose(report.losses, finished.losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        report.after["margin of log-probabilities"], finished.after["margin of log-probabilities"], rtol=1e-3
    )


def test_answers_with_labels(preferences, directory, tmp_path, lenient):
    config = dataclasses.replace(preferences, out=tmp_path, data=str(directory / "rated"), loss="kto")
    report = dpo.run(config)
    assert np.mean(report.after["reward has the right sign"]) > 0.5


def test_an_aim_that_is_not_reached():
    report = Report({}, 1, 1.0, [1.0], {}, [], {"reward": [0.0, 1.0, 0.0]}, {"reward": [0.0, 1.0, 1.0]}, [])
    assert verdict(report, Aim("reward", None)).endswith("is NOT reached")
    assert verdict(report, Aim("reward", 0.3)).endswith("the aim of +0.3 is reached")
