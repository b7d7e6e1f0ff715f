"""The sweep end to end on a tiny model: what it finds and writes, resumed, diverging, and what a user can put right."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments import run
from experiments.configs.sweep import Config
from experiments.studies import joint, sweep
from experiments.studies.problem import accuracy, answers, load

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_data):
    return Config(
        ranks=(1, 3),
        learning_rates=(1e-4, 0.03),
        model=str(tiny_model),
        data=str(tiny_data),
        train_examples=48,
        validation_examples=None,
        test_examples=None,
        batch_size=16,
        lengths=(12,),
        epochs=2,
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, sweep.run(config)


def command(config, monkeypatch):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    return run.main(["sweep"])


def test_the_best_pair_is_chosen_by_validation_and_saved(finished):
    config, result = finished
    assert result.grid == [(1, 1e-4), (1, 0.03), (3, 1e-4), (3, 0.03)]
    assert len(result.losses) == 6
    assert result.validation_accuracy[result.chosen] == max(result.validation_accuracy)
    record = json.loads((config.out / "run.json").read_text())
    assert record["result"]["test_accuracy"] == result.test_accuracy and record["config"]["ranks"] == [1, 3]
    assert (config.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    problem = load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    delta = lora.load(record["adapter"], problem.base)
    ranks = {node.rank for path, node in delta.items() if path.startswith("encoder")}
    assert ranks == {result.grid[result.chosen][0]}
    apply, params = jax.jit(problem.apply), lora.merge(problem.base, delta)
    logits = answers(lambda *inputs: apply(params, *inputs)[0], problem.splits["test"], problem.lengths)
    assert accuracy(logits, problem.splits["test"]) == result.test_accuracy


def test_a_finished_sweep_is_shown_again(finished, monkeypatch, capsys):
    config, result = finished
    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert dataclasses.replace(sweep.run(config), grid=result.grid) == result
    out = capsys.readouterr().out
    assert "rank" in out and f"test {result.test_accuracy:.1%}" in out
    with pytest.raises(pytest.fail.Exception):
        sweep.run(dataclasses.replace(config, alpha=3.0))


def test_resumed_sweep_is_the_same_sweep(settings, finished, tmp_path, monkeypatch, capsys):
    config, real = dataclasses.replace(settings, out=tmp_path), lora.train_many

    def interrupted(*args, **kwargs):
        step = real(*args, **kwargs)

        def stepping(states, batch):
            if int(states.step[0]) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return step(states, batch)

        return stepping

    monkeypatch.setattr(lora, "train_many", interrupted)
    assert command(config, monkeypatch) == 130
    assert capsys.readouterr().err == "interrupted: the same command resumes\n"
    monkeypatch.setattr(lora, "train_many", real)
    result = sweep.run(config)
    assert "resumed at step 4 of 6" in capsys.readouterr().out
    assert dataclasses.replace(result, seconds=0) == dataclasses.replace(finished[1], seconds=0)


def test_what_diverges_is_stopped(settings, finished, tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(settings, out=tmp_path, learning_rates=(1e-4, 1e30), clip=1e30)
    result = sweep.run(broken)
    assert [score is None for score in result.validation_accuracy] == [False, True, False, True]
    assert "–" in capsys.readouterr().out and np.isfinite(result.losses).all()
    assert result.validation_accuracy[0] == finished[1].validation_accuracy[0]
    assert command(dataclasses.replace(broken, learning_rates=(1e30,)), monkeypatch) == 2
    assert "all adapters diverged" in capsys.readouterr().err


def test_what_the_user_can_put_right_is_one_sentence(settings, tmp_path, monkeypatch, capsys):
    for change, message in (
        ({"ranks": (64,)}, "LoRA(rank=64) is above the rank of the weight"),
        ({"data": str(tmp_path / "nowhere")}, "no such data directory"),
        ({"model": "./nowhere"}, "no such directory"),
    ):
        assert command(dataclasses.replace(settings, out=tmp_path, **change), monkeypatch) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    monkeypatch.undo()
    for flags, message in ((["--ranks", "2", "2"], "different numbers"), (["--epochs", "0"], "epochs")):
        assert run.main(["sweep", *flags]) == 2
        assert message in capsys.readouterr().err
