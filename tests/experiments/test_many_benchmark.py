"""The benchmark of many adapters at a tiny size: both sides compute the same, and the command says so."""

import dataclasses

import numpy as np
import pytest

from experiments.benchmarks import gpt2_step_model as model
from experiments.benchmarks import many
from experiments.configs import quickstart

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def config(tiny_model, tiny_data):
    trained = quickstart.Config(
        model=str(tiny_model),
        data=str(tiny_data),
        train_examples=20,
        validation_examples=1,
        test_examples=1,
        batch_size=4,
        lengths=(12,),
        rank=2,
    )
    shape = model.Shape(layers=1, width=16, hidden=32, heads=2, vocabulary=40, batch=3, length=6)
    return many.Config(shape=shape, rank=2, rounds=1, trained=trained, adapters=2, steps=2, runs=1)


def test_kinds_of_the_forward_agree(config, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")  # grouped products too
    outputs = {name: np.asarray(forward()) for name, forward in many.forwards(config, length=4).items()}
    assert outputs[many.SINGLE].shape == (3, 4, 40)
    np.testing.assert_allclose(outputs[many.GROUPED], outputs[many.ROUTED], rtol=1e-5, atol=1e-6)
    with_first = [np.allclose(*rows, rtol=1e-5, atol=1e-6) for rows in zip(outputs[many.ROUTED], outputs[many.SINGLE])]
    assert sum(with_first) == 1, "one example has the adapter that the other side gives all"


def test_command_prints_both_sides_and_verdicts(config, capsys):
    status = many.main(config)
    printed = capsys.readouterr().out
    for name in (many.ROUTED, many.SINGLE):
        assert printed.count(f"\n  {name} ") == 2
    for name in (many.TOGETHER, many.APART):
        assert printed.count(f"\n  {name} ") == 1
    assert printed.count("PASS") + printed.count("FAIL") == 2
    assert status == int("FAIL" in printed)
    difference = float(printed.split("last losses differ by ")[1].split()[0])
    assert difference < 1e-5


def test_missing_data_is_one_sentence(config, capsys):
    trained = dataclasses.replace(config.trained, data="nowhere")
    assert many.main(dataclasses.replace(config, trained=trained)) == 2
    assert capsys.readouterr().err.count("\n") == 1
