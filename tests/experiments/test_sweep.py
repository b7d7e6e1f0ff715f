"""The sweep end to end on a tiny model: what it selects and writes, diverging, and what a user can put right."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments import run
from experiments.configs.sweep import Config
from experiments.studies import sweep
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


def test_validation_selects_a_rate_for_each_rank(finished):
    config, summaries = finished
    assert [summary.row.name for summary in summaries] == ["1", "3"]
    for summary in summaries:
        assert list(summary.tried) == [1e-4, 0.03]
        assert summary.tried[summary.results[0].lr] == max(summary.tried.values())
    chosen = sweep.best(summaries)
    problem = load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    delta = chosen.adapter()
    assert {str(node.rank) for path, node in delta.items() if path.startswith("encoder")} == {chosen.row.name}
    apply, params = jax.jit(problem.apply), lora.merge(problem.base, delta)
    logits = answers(lambda *inputs: apply(params, *inputs)[0], problem.splits["test"], problem.lengths)
    assert accuracy(logits, problem.splits["test"]) == chosen.results[0].test_accuracy


def test_table_and_record_have_every_run(finished):
    config, summaries = finished
    record = json.loads((config.out / "run.json").read_text())
    assert [row["tried"] for row in record["rows"]] == [
        {f"{rate:g}": score for rate, score in summary.tried.items()} for summary in summaries
    ]
    table = sweep.grid(summaries)
    assert table.header[:3] == ["rank", "1e-4", "3e-2"] and [row[0] for row in table.rows] == ["1", "3"]
    assert (config.out / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_what_diverges_is_stopped(settings, finished, tmp_path, monkeypatch, capsys):
    broken = dataclasses.replace(settings, out=tmp_path, learning_rates=(1e-4, 1e30), clip=1e30)
    summaries = sweep.run(broken)
    for summary, whole in zip(summaries, finished[1]):
        assert np.isnan(summary.tried[1e30]) and summary.tried[1e-4] == whole.tried[1e-4]
    assert "diverged" in capsys.readouterr().out
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: dataclasses.replace(broken, learning_rates=(1e30,)))
    assert run.main(["sweep"]) == 2
    assert "all adapters diverged" in capsys.readouterr().err


def test_what_the_user_can_put_right_is_one_sentence(settings, tmp_path, monkeypatch, capsys):
    for change, message in (
        ({"ranks": (64,)}, "LoRA(rank=64) is above the rank of the weight"),
        ({"data": str(tmp_path / "nowhere")}, "no such data directory"),
        ({"model": "./nowhere"}, "no such directory"),
    ):
        changed = dataclasses.replace(settings, out=tmp_path, **change)
        monkeypatch.setattr("tyro.cli", lambda *args, config=changed, **kwargs: config)
        assert run.main(["sweep"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    monkeypatch.undo()
    for flags, message in ((["--ranks", "2", "2"], "different numbers"), (["--epochs", "0"], "epochs")):
        assert run.main(["sweep", *flags]) == 2
        assert message in capsys.readouterr().err
