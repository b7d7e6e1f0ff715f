"""The analysis study end to end, on a tiny model: what it writes, what it resumes, what it refuses."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from experiments import run
from experiments.configs.analysis import Config
from experiments.studies import analysis as study
from experiments.studies import analysis_runs

pytestmark = pytest.mark.usefixtures("lenient")  # optax's Adam promotes: a float to the power of an integer

PICTURES = ("subspaces.png", "amplification.png", "direction-magnitude.png")


@pytest.fixture(scope="module")
def config(tiny_model, tiny_data, tmp_path_factory):
    return Config(
        rank=1,
        large_rank=3,
        layer=0,
        out=tmp_path_factory.mktemp("analysis"),
        model=str(tiny_model),
        data=str(tiny_data),
        train_examples=48,
        validation_examples=20,
        epochs=2,
        batch_size=16,
        lengths=(12,),
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def interrupted_and_finished(config):
    """The findings of a study that was interrupted in its third run, and how often it trained."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        real, begun = analysis_runs._train, []

        def train(start, method, seed, *rest):
            begun.append((method.name, seed))
            if len(begun) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            real(start, method, seed, *rest)

        patch.setattr(analysis_runs, "_train", train)
        with pytest.raises(KeyboardInterrupt):
            study.run(config)
        return study.run(config), begun


def test_a_resumed_study_repeats_no_finished_run(interrupted_and_finished):
    _, begun = interrupted_and_finished
    assert begun == [
        ("LoRA r=1", 0),
        ("LoRA r=3", 0),
        ("LoRA r=3", 1),
        ("LoRA r=3", 1),
        ("DoRA r=1", 0),
        ("full", 0),
    ]


def test_what_is_found(interrupted_and_finished):
    findings, _ = interrupted_and_finished
    assert [path.split("/")[-2] for path in findings.similarities] == ["query", "value"]
    for grids in findings.similarities.values():
        assert [grid.shape for grid in grids.values()] == [(1, 3), (3, 3), (3, 3), (3, 3)]
        assert all((grid >= 0).all() and (grid <= 1 + 1e-9).all() for grid in grids.values())
    assert list(findings.amplifications) == ["LoRA r=1", "LoRA r=3", "DoRA r=1", "full"]
    for amplifications in findings.amplifications.values():
        assert all(x.factor > 0 and x.projected <= x.largest for x in amplifications.values())
    for steps in findings.drifts.values():
        assert list(steps) == [3, 6]
        assert all(drift.direction > 0 for paths in steps.values() for drift in paths.values())
    assert all(-1 <= value <= 1 for parts in findings.correlations.values() for value in parts.values())


def test_what_is_written(config, interrupted_and_finished):
    for name in PICTURES:
        assert (config.out / name).read_bytes().startswith(b"\x89PNG")
    record = json.loads((config.out / "analysis.json").read_text())
    findings, _ = interrupted_and_finished
    path = next(iter(findings.similarities))
    stored = record["similarities"][path]["LoRA r=3, two seeds"]
    np.testing.assert_allclose(stored, findings.similarities[path]["LoRA r=3, two seeds"], atol=1e-6)
    assert record["amplifications"]["full"][path]["scale"] == 1.0 and record["config"]["rank"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--large-rank", "8"], "large_rank must be above rank (8), not 8"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--layer", "-1"], "layer must not be negative"),
        (["--lengths", "12", "8"], "lengths must be ascending"),
    ],
)
def test_wrong_flags(capsys, monkeypatch, flags, message):
    monkeypatch.setenv("COLUMNS", "200")
    assert run.main(["analysis", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, "error: --layer 1: expected a layer from 0 to 0"),
        ({"large_rank": 17}, "error: --large-rank 17 exceeds the rank of the model's weights, 16"),
    ],
)
def test_settings_that_the_model_does_not_have(config, capsys, monkeypatch, change, message):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: dataclasses.replace(config, **change))
    assert run.main(["analysis"]) == 2
    assert capsys.readouterr().err.strip() == message
