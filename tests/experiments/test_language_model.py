"""The studies of tiny decoders end to end: what they write, that a resumed run is the same run, what is refused."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from experiments import run
from experiments.configs import gpt2_tiny, llama_tiny
from experiments.models import checkpoint, location
from experiments.studies.language_model import exchange, problem, study, training

pytestmark = pytest.mark.usefixtures("lenient")  # optax's Adam promotes: a float to the power of an integer
SMALL = {
    "train_examples": 96,
    "validation_examples": 16,
    "test_examples": 24,
    "epochs": 2,
    "batch_size": 16,
    "lengths": (24,),
    "loss_chunk": 10,
    "rank": 4,
    "alpha": 8.0,
    "lr": 0.02,
    "new_tokens": 5,
    "checkpoint_every": 3,
}
FLAGS = [
    text
    for name, value in SMALL.items()
    for text in (f"--{name.replace('_', '-')}", str(value[0] if isinstance(value, tuple) else value))
]


def make(family, out):
    module = {"llama": llama_tiny, "gpt2": gpt2_tiny}[family]
    return dataclasses.replace(module.DEFAULTS, **SMALL, out=out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config and the report of a run that nothing interrupted."""
    config = make("gpt2", tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, study.run(config)


def directory(config):
    (path,) = (path for path in config.out.iterdir() if path.is_dir())
    return path


def check(config, report):
    """What must hold of every finished run."""
    ways = report.perplexities
    assert ways["adapted"] < 0.5 * ways["base"] and ways["frequencies"] < 512  # as many tokens there are
    assert len(report.losses) == 12 and [step for step, _ in report.evaluations] == [0, 6, 12]
    assert np.exp(report.evaluations[-1][1]) < 0.7 * np.exp(report.evaluations[0][1])
    assert len(report.texts) == 19 and any(before != after for _, before, after in report.texts)
    weights = [one for one in report.agreements if one.difference is None]
    logits = [one.difference for one in report.agreements if one.difference is not None]
    assert len(weights) == len(logits) == 3
    assert all(one.same == one.count > 0 and one.verdict.startswith("all ") for one in weights)
    assert max(logits) < 1e-4 and logits[-1] == 0  # of the adapter that was read again

    record = json.loads((config.out / "run.json").read_text())
    assert record["config"]["rank"] == 4 and "jax" in record["versions"]
    assert record["result"]["losses"] == report.losses and record["directory"] == directory(config).name
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert study.Report.load(directory(config) / "result.json") == report
    left = {".lora_jax.json", "merged", "peft", "result.json", "config.json", "metrics.jsonl", "tensorboard"}
    assert {path.name for path in directory(config).iterdir()} == left
    settings = json.loads((directory(config) / "peft" / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM" and settings["base_model_name_or_path"] == config.model
    merged = directory(config) / "merged"
    assert checkpoint.read_config(merged)["model_type"] == config.family and (merged / "tokenizer.json").is_file()


def test_gpt2_end_to_end(finished):
    check(*finished)


def test_llama_end_to_end(tmp_path):
    config = make("llama", tmp_path)
    report = study.run(config)
    check(config, report)
    # the merged checkpoint is a base of its own
    merged = problem.load(dataclasses.replace(config, model=str(directory(config) / "merged")), report=str)
    loss = training.prepare(merged, config).loss({}, "test")
    assert np.exp(loss) == pytest.approx(report.perplexities["adapted"], rel=1e-5)


def test_losses_of_the_base_are_those_of_its_logits(tmp_path):
    config = make("gpt2", tmp_path)
    parts = problem.load(config, report=str)
    total, count = 0.0, 0
    for batch in parts.batches("test"):
        logits = jax.nn.log_softmax(jax.jit(parts.apply)(parts.base, batch["tokens"]))
        asked = batch["labels"] >= 0
        total -= float(np.asarray(logits)[asked, batch["labels"][asked]].sum())
        count += int(asked.sum())
    assert training.prepare(parts, config).loss({}, "test") == pytest.approx(total / count, rel=1e-5)


def test_finished_runs_are_not_repeated_unless_asked(finished, monkeypatch, tmp_path, capsys):
    config = dataclasses.replace(finished[0], out=tmp_path / "out")
    shutil.copytree(finished[0].out, config.out)
    monkeypatch.setattr(training, "prepare", lambda *args: pytest.fail("trained again"))
    assert study.run(dataclasses.replace(config, samples=2)) == finished[1]
    out = capsys.readouterr().out
    assert "base and adapter" in out and out.count("before: ") == 2
    for changed in ({"lr": 0.01}, {"targets": ("attention",)}, {"fresh": True}):
        with pytest.raises(pytest.fail.Exception):
            study.run(dataclasses.replace(config, **changed))
    assert not list(config.out.glob("*/result.json"))


def test_resumed_run_is_the_same_run(finished, interrupt_at, tmp_path, capsys):
    config = dataclasses.replace(finished[0], out=tmp_path)
    interrupt_at(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        study.run(config)
    interrupt_at(0, None)
    (directory(config) / "merged").mkdir()  # what an interrupted export leaves
    (directory(config) / "merged" / "config.json").write_text("{}")
    resumed = study.run(config)
    assert "resumed at step 8 of 12" in capsys.readouterr().out
    for name in ("losses", "evaluations", "texts", "perplexities", "agreements"):
        assert getattr(resumed, name) == getattr(finished[1], name), name


def answer(capsys, *args):
    status = run.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def test_what_the_user_can_put_right_is_one_sentence(capsys, tmp_path, tiny_model):
    def check(message, name, *flags):
        status, _, err = answer(capsys, name, *FLAGS, "--out", tmp_path / "out", *flags)
        assert status == 2 and message in err
        assert err.startswith("error: ") and err.count("\n") == 1

    check("model_type is 'gpt2', supported is 'llama'", "llama-tiny", "--model", "tiny-gpt2")
    check("model_type is 'bert', supported is 'gpt2'", "gpt2-tiny", "--model", tiny_model)
    check("no such directory", "llama-tiny", "--model", "./nowhere")
    check("no such data directory", "llama-tiny", "--data", tmp_path / "nowhere")
    check("has only 128 positions", "gpt2-tiny", "--lengths", "200")
    check("has only 128 positions", "gpt2-tiny", "--new-tokens", "140")
    check("head of tiny-gpt2 is its token embedding", "gpt2-tiny", "--targets", "attention", "head")
    check("rank", "llama-tiny", "--rank", "1000")
    broken = tmp_path / "broken"
    shutil.copytree(location.find("tiny-llama"), broken)
    (broken / "tokenizer.json").unlink()
    check("tokenizer.json: no such file", "llama-tiny", "--model", broken)
    (broken / "tokenizer.json").write_text("{}")
    check("cannot be read as a tokenizer", "llama-tiny", "--model", broken)
    tokenizer = json.loads((location.find("tiny-llama") / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["antidisestablishment"] = 512
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    check("513 tokens, but the model has only 512", "llama-tiny", "--model", broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    check("model.safetensors", "llama-tiny", "--model", broken)


def test_differences_are_told():
    same = exchange.Agreement("x", "y", same=3, count=4)
    assert same.verdict == "3 of 4 equal"
    assert exchange.Agreement("x", "y", difference=1.5e-5).verdict == "differ by at most 1.5e-05"
    assert exchange._equal([np.ones(3)], [np.array([1, 1, 2.0])]) == (2, 3)
    with pytest.raises(ValueError, match="different paths"):
        exchange._arrays({"a": np.ones(1)}, {"b": np.ones(1)})
