"""The sweep over learning rates end to end on tiny models, and what its findings conclude from curves."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from experiments import command_line, run
from experiments.configs.lr_sweep import Config
from experiments.studies import joint
from experiments.studies.lr_sweep import encoder, findings, study
from experiments.studies.lr_sweep.curve import Curve, measured

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_data):
    return Config(
        ranks=(1, 2),
        attention=False,
        lora_rates=(1e-3, 1e-2, 1e-1),
        full_rates=(1e-4, 1e-3, 1e-2),
        model=str(tiny_model),
        data=str(tiny_data),
        head_examples=30,
        train_examples=48,
        validation_examples=None,
        batch_size=16,
        lengths=(12,),
        decoder="tiny-llama",
        decoder_data=("debian_sections",),
        decoder_rates=(1e-3, 1e-2),
        decoder_steps=2,
        decoder_examples=4,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, study.run(config)


def command(config, monkeypatch):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    return run.main(["lr-sweep"])


def test_every_curve_is_measured_and_written(finished):
    config, curves = finished
    names = ["LoRA, rank 1", "LoRA, rank 2", "full fine-tuning", "LoRA, rank 16"]
    assert [curve.name for curve in curves] == names
    for curve in curves[:-1]:
        assert curve.losses[0] != curve.start and curve.rates[curve.best] in curve.as_good
        assert curve.errors[curve.best] == 0 and len(curve.examples) == 30
        assert curve.losses[curve.best] == pytest.approx(np.mean(curve.examples), abs=1e-5)
    assert curves[-1].rates == [1e-3, 1e-2] and all(np.isfinite(curves[-1].losses))
    record = json.loads((config.out / "run.json").read_text())
    assert [row["losses"] for row in record["curves"]] == [curve.losses for curve in curves]
    assert {row["verdict"] for row in record["findings"]} <= {"observed", "not observed", "not decided"}
    assert (config.out / "lr-sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_sweep_repeats_no_finished_curve(
    settings, finished, tmp_path, monkeypatch, interrupt_many_at, capsys
):
    config = dataclasses.replace(settings, out=tmp_path, decoder=None)
    begun = interrupt_many_at(2, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command(config, monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted: the same command resumes\n"
    curves = study.run(config)
    assert len(begun) == 4 and "resumed at step 2 of 3" in capsys.readouterr().out  # rank 1 is read
    by_name = {curve.name: curve for curve in finished[1]}
    for curve in curves:
        assert dataclasses.replace(curve, seconds=0) == dataclasses.replace(by_name[curve.name], seconds=0)
    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert study.run(config) == curves
    with pytest.raises(pytest.fail.Exception):
        study.run(dataclasses.replace(config, alpha=3.0))


def curve(best, *, rates=tuple(10.0 ** (power / 4) for power in range(-20, -3)), name="", offset=0.0, rule=1e-3):
    """A parabola with its minimum at `best`, and examples whose losses differ by 0.01."""
    examples = np.linspace(-0.01, 0.01, 50)[:, None] + offset + (np.log10(rates) - np.log10(best)) ** 2
    zeros = np.zeros(len(rates))
    return measured("m", name, list(rates), examples, zeros, start=1.0, rule=rule, seconds=0.0)


def test_the_best_rate_is_the_tried_one_with_the_smallest_loss():
    assert curve(1e-3).best_rate == 1e-3 and not curve(1e-3).at_edge
    assert curve(1e-9).at_edge and curve(1e-9).best_rate == 1e-5
    diverged = Curve("m", "", [1e-4, 1e-3, 1e-2, 1e-1], [0.5, 0.1, 90.0, None], [], [], [], 1.0, 1e-3, 0.0)
    assert diverged.best_rate == 1e-3 and diverged.as_good == [1e-3]


def test_rates_within_the_noise_are_as_good():
    noise = np.random.default_rng(0).normal(size=(200, 3))
    losses = np.array([0.5, 0.501, 0.9]) + 0.1 * noise
    assert measured("", "", [1, 2, 3], losses, np.zeros(3), start=1, rule=1, seconds=0).as_good == [1, 2]


@pytest.mark.parametrize(
    ("adapted", "full", "ratio", "ranks"),
    [
        ((1e-3, 1.8e-3), 2e-4, "observed", "observed"),
        ((1e-4, 3e-3), 1e-4, "observed", "not observed"),
        ((1e-3, 1e-3), 8e-4, "not observed", "observed"),
        ((1e-9, 1e-3), 1e-4, "not decided", "not decided"),
    ],
)
def test_verdicts_on_rates(adapted, full, ratio, ranks):
    curves = [curve(best, name=f"LoRA, rank {best}") for best in adapted]
    assert findings.compare_ratio(curves, curve(full)).verdict == ratio
    assert findings.compare_ranks(curves).verdict == ranks


def test_verdicts_on_losses():
    good, bad = curve(1e-3, name="good"), curve(1e-3, name="bad", offset=0.5)
    assert findings.compare_quality([good], bad).verdict == "observed"
    assert findings.compare_quality([bad], good).verdict == "not observed"
    assert findings.compare_targets(bad, good).verdict == "observed"
    assert findings.compare_targets(good, bad).verdict == "not observed"
    assert findings.compare_targets(good, good).verdict == "not decided"
    assert findings.compare_rule(good).verdict == "observed"
    assert findings.compare_rule(curve(1e-3, rule=1e-1)).verdict == "not observed"
    decoder = Curve("m", "", [1e-4, 1e-3, 1e-2], [3.0, 2.0, 3.0], [], [], [], 4.0, 1.5e-3, 0.0)
    assert findings.compare_rule(decoder).verdict == "observed"
    assert findings.compare_rule(dataclasses.replace(decoder, rule=9e-3)).verdict == "not observed"
    assert findings.compare_rule(dataclasses.replace(decoder, losses=[3.0, 2.0, 1.0])).verdict == "not decided"


def test_what_the_user_can_put_right_is_one_sentence(settings, tmp_path, monkeypatch, capsys):
    for change, message in (
        ({"ranks": (64,)}, "LoRA(rank=64) is above the rank of the weight"),
        ({"decoder": "./nowhere"}, "no such"),
        ({"data": str(tmp_path / "nowhere")}, "no such data directory"),
    ):
        assert command(dataclasses.replace(settings, out=tmp_path, **change), monkeypatch) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    monkeypatch.undo()
    assert run.main(["lr_sweep", "--lora-rates", "0.1", "0.01"]) == 2
    assert "lora_rates must be ascending" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_attention_has_as_many_parameters_as_the_middle_rank():
    config = Config()
    names = [line.name for line in encoder.lines(config)]
    assert names == ["LoRA, rank 1", "LoRA, rank 8", "LoRA, rank 64", "LoRA on attention, rank 18", "full fine-tuning"]
    width = 384
    attention, linear = (8 * width * rank for rank in (config.attention_rank, config.middle_rank))
    assert attention == linear + 10 * width * config.middle_rank


def test_fast_and_both_spellings_of_the_command():
    assert command_line.find_config("lr-sweep") is command_line.find_config("lr_sweep")
    assert Config(fast=True).decoder == "tiny-llama" and Config(fast=True, decoder=None).decoder is None
