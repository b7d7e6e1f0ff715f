"""Supervised fine-tuning with the setting of DoRA's authors on commonsense reasoning."""

import json

import pytest

from experiments import command_line, execution
from experiments.configs.decoder import BatchSizes
from experiments.input.official import commonsense
from experiments.studies.sft import comparison, study
from tests.experiments import official_data as official

pytestmark = pytest.mark.usefixtures("lenient")

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def parsed(*args):
    """The config of a command line."""
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "execute", lambda config: configs.append(config) or 0)
        assert command_line.main(["sft", "--paper", "commonsense", *map(str, args)]) == 0
    return configs[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Commonsense in its distributed form."""
    root = tmp_path_factory.mktemp("commonsense")
    rows = [official.choice(task, "answer1") for task in commonsense.TASKS]
    official.write_json(root / "commonsense_170k.json", rows)
    for task in commonsense.TASKS:
        official.write_json(root / "dataset" / task / "test.json", [official.choice(task, "answer1")])
    return root


def test_the_values_are_those_of_the_table(data):
    config = parsed("--model", "llama", "--data", data)
    assert (config.methods, config.rank, config.alpha, config.dropout, config.lr) == (("dora",), 32, 64, 0.05, 1e-4)
    assert (config.batch.global_, config.epochs, config.warmup, config.schedule) == (16, 3, 100, "linear")
    assert config.targets == ("query", "key", "value", "up", "down") and (config.beams, config.length) == (4, 256)
    assert (config.train_on, config.test_examples, config.out.name) == ("all", None, "sft-commonsense")
    baseline = parsed("--model", "llama", "--data", data, "--methods", "lora", "--lr", "3e-4", "--batch.global", 8)
    assert (baseline.methods, baseline.lr, baseline.batch, baseline.rank) == (("lora",), 3e-4, BatchSizes(8), 32)


def test_the_smallest_run(data, tmp_path, monkeypatch):
    flags = ("--model", "tiny-llama", "--data", data, "--fast", "--template", TEMPLATE, "--length", 128)
    assert parsed(*flags).out.name == "sft-commonsense-fast"
    config = parsed(*flags, "--out", tmp_path)
    (result,) = comparison.run(config)
    assert result.name == "dora" and len(result.losses) == 2
    stored = json.loads((tmp_path / "dora" / "config.json").read_text())
    assert stored["targets"] == list(config.targets) and stored["rank"] == 2
    monkeypatch.setattr(study, "_train", lambda *args: pytest.fail("trained again"))
    assert comparison.run(config)[0].losses == result.losses


@pytest.mark.parametrize("flags", [["--model", "llama"], ["--data", "commonsense:x"], ["--fast"]])
def test_model_and_data_are_those_of_the_user(flags, capsys):
    assert command_line.main(["sft", "--paper", "commonsense", *flags]) == 2
    assert "pass a model and data as in the original setting" in " ".join(capsys.readouterr().err.split())
