"""Post-training: preferences, and rewards of sampled answers, on one device and on a mesh."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments import run
from experiments.configs import distill as distill_config
from experiments.configs import dpo as dpo_config
from experiments.configs import grpo as grpo_config
from experiments.configs import reward as reward_config
from experiments.configs.decoder import BatchSizes
from experiments.errors import Preempted, UserError
from experiments.input.records import Problem
from experiments.models import location
from experiments.studies.post_training import distill, dpo, grpo, reward
from experiments.studies.post_training.data import read_data
from experiments.studies.post_training.instructed import instruct
from experiments.studies.post_training.report import Report, change, verdict
from experiments.studies.post_training.task import Aim
from experiments.studies.sft.recorded import restore, write_run
from experiments.training.interrupt import Interrupt
from experiments.training.mesh import MeshSizes
from tests.experiments.sft_runs import adapters_equal


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Llama, preferences for words over numbers, answers with labels, and problems."""
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
        write(directory / "problems" / f"{split}.jsonl", [{"prompt": p, "answer": "e"} for p in prompts])
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
def problems(directory):
    return grpo_config.Config(
        model=str(directory / "model"),
        data=str(directory / "problems"),
        out=directory / "grpo",
        reward="contains",
        temperature=1.0,
        batch=BatchSizes(4),
        group=4,
        new_tokens=4,
        epochs=2,
        rank=2,
        lr=2e-2,
        checkpoint_every=3,
        samples=2,
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


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust", "orpo", "simpo"])
def test_other_losses(preferences, tmp_path, loss, lenient):
    report = dpo.run(
        dataclasses.replace(preferences, out=tmp_path, loss=loss, smoothing=0.1 if loss == "robust" else 0.0, steps=4)
    )
    assert change(report, "margin of log-probabilities")[0] > 0


def test_answers_with_labels(preferences, directory, tmp_path, lenient):
    config = dataclasses.replace(preferences, out=tmp_path, data=str(directory / "rated"), loss="kto")
    report = dpo.run(config)
    assert np.mean(report.after["reward has the right sign"]) > 0.5


def test_the_start_is_the_reference(preferences, finished, tmp_path, lenient):
    config = dataclasses.replace(
        preferences, out=tmp_path, rank=16, init_from=preferences.out / "adapter", steps=1, quantize="int8"
    )
    report = dpo.run(config)
    assert report.losses[0] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"quantize": "nf4", "mesh": MeshSizes(data=2)}])
def test_scores_rank_pairs(preferences, tmp_path, options, lenient):
    names = ("model", "data", "batch", "epochs", "rank", "lr", "checkpoint_every")
    shared = {name: getattr(preferences, name) for name in names}
    report = reward.run(reward_config.Config(out=tmp_path, steps=None, **shared, **options))
    assert report.losses[-1] < report.losses[0] / 2
    assert np.mean(report.after[reward.ACCURACY]) == 1 > np.mean(report.before[reward.ACCURACY])
    assert "score/kernel" in lora.load(tmp_path / "adapter")


def test_rewards_rise_and_a_run_resumes_bit_for_bit(problems, tmp_path, monkeypatch, lenient):
    report = grpo.run(problems)
    assert len(report.losses) == 8 == len(report.means["reward"])
    assert np.mean(report.means["reward"][-2:]) > np.mean(report.means["reward"][:2])
    assert change(report, "reward")[0] > 0 and len(report.texts) == 2
    config = dataclasses.replace(problems, out=tmp_path)
    monkeypatch.setattr(Interrupt, "requested", lambda self, step: step == 4)
    with pytest.raises(Preempted):
        grpo.run(config)
    monkeypatch.undo()
    again = grpo.run(config)
    assert (again.losses, again.means, again.after, again.texts) == (
        report.losses,
        report.means,
        report.after,
        report.texts,
    )


@pytest.mark.parametrize("options", [{}, {"on_policy": True, "mix": 0.5, "mesh": MeshSizes(data=2)}])
def test_an_instruction_is_distilled(problems, tmp_path, options, lenient):
    names = ("model", "data", "batch", "rank", "lr", "new_tokens", "temperature", "samples")
    shared = {name: getattr(problems, name) for name in names}
    config = distill_config.Config(
        out=tmp_path, instruction="Say a lot of things", reward="contains", steps=None, epochs=4, **shared, **options
    )
    report = distill.run(config)
    assert len(report.losses) == 16 and np.mean(report.losses[-4:]) < np.mean(report.losses[:4])
    assert report.after[distill.INSTRUCTED] == report.before[distill.INSTRUCTED]


def test_the_teacher_reads_an_instruction_and_examples():
    system = {"role": "system", "content": "Be brief."}
    asked, solved = (Problem((system, {"role": "user", "content": text}), "e") for text in ("Hi", "Ho"))
    prompt = instruct(asked, "Answer.", [solved, Problem("Ha", "e")]).prompt
    texts = [message["content"] for message in prompt]
    assert texts == ["Answer.", "Ho", "e", "Hi"] and [message["role"] for message in prompt][2] == "assistant"
    assert instruct(Problem("Hi", "e"), "Answer.", [solved]).prompt == "Answer.\n\nHi"


def test_a_teacher_that_reads_too_much_is_refused(problems, tmp_path):
    names = ("model", "data", "batch", "new_tokens")
    shared = {name: getattr(problems, name) for name in names}
    with pytest.raises(
        UserError, match=r"teacher with 2 examples and an answer have up to .* supports 128; set fewer --examples"
    ):
        distill.run(distill_config.Config(out=tmp_path, instruction="Say it " * 200, examples=2, **shared))


def test_rewards_on_a_mesh(problems, tmp_path, lenient):
    config = dataclasses.replace(problems, out=tmp_path, steps=2, mesh=MeshSizes(data=2), form="dapo", beta=0.1)
    report = grpo.run(config)
    assert len(report.losses) == 2 and all(np.isfinite(report.losses))


def test_chat_starts_with_the_system_message_of_the_prompts(problems, tmp_path):
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    write_run(tmp_path, problems, Problem(messages, "Hello"))
    assert restore(tmp_path)[1] == "Be brief."
    write_run(tmp_path, problems, Problem("Hi", "Hello"))
    assert restore(tmp_path)[1] is None


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("dpo", ["--data", "{}/problems"], "a prompt with a checkable answer (prompt and answer), which dpo does not"),
        ("dpo", ["--data", "{}/pairs", "--loss", "kto"], "which dpo --loss kto does not support"),
        ("dpo", ["--data", "{}/pairs/train.jsonl"], "has no validation examples, on which base and adapter are"),
        ("grpo", ["--data", "{}/pairs"], "a preference record (chosen and rejected, and prompt or a shared beginning)"),
        ("grpo", ["--group", "1"], "group must be at least 2"),
        ("dpo", ["--validation-examples", "0"], "expected at least one record to compare base and adapter on"),
    ],
)
def test_bad_settings_and_data(directory, tmp_path, capsys, name, flags, message):
    args = [flag.format(directory) for flag in flags]
    assert run.main([name, "--model", "tiny-llama", "--out", str(tmp_path / "out"), *args]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_aim_that_is_not_reached():
    common = {"settings": {}, "trained_parameters": 1, "seconds": 1.0, "losses": [1.0], "evaluations": [], "texts": []}
    values = {"before": {"reward": [0.0, 1.0, 0.0]}, "after": {"reward": [0.0, 1.0, 1.0]}}
    report = Report(**common, **values, means={})
    assert verdict(report, Aim("reward", None)).endswith("is NOT reached")
    assert verdict(report, Aim("reward", 0.3)).endswith("the aim of +0.3 is reached")


def test_another_setting_is_refused(preferences, finished, lenient):
    with pytest.raises(UserError, match=r"a finished run with loss sigmoid, not ipo; --fresh starts over"):
        dpo.run(dataclasses.replace(preferences, loss="ipo"))


def test_bad_pairs_are_counted_and_named(tmp_path, capsys):
    """As `sft` does: the first one ends the run with its line, or all are skipped; pairs that are too long always."""
    pairs = [{"prompt": f"Package {i}:", "chosen": " a game", "rejected": " a mail"} for i in range(6)]
    bad = [pairs[0] | {"rejected": " a game "}, pairs[0] | {"chosen": " "}, pairs[0] | {"rejected": ""}]
    long = pairs[0] | {"chosen": " a game" * 40}
    for name, rows in (("train", [*pairs[:2], *bad, long, *pairs[2:]]), ("validation", pairs)):
        write(tmp_path / f"{name}.jsonl", rows)
    path = tmp_path / "train.jsonl"
    assert run.main(["dpo", "--model", "tiny-llama", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {path}, line 3: chosen and rejected are the same; expected answers that differ\n"
    config, lines = dpo_config.Config(model="tiny-llama", data=str(tmp_path), on_bad="skip", length=64), []
    data = read_data(config, location.find("tiny-llama"), lines.append)
    (malformed,) = [line for line in lines if "malformed" in line]
    assert malformed.startswith(f"training: skipped: 3 malformed records, such as {path}, line 3: chosen and")
    assert f"; {path}, line 4: chosen is empty" in malformed and f"; {path}, line 5: rejected is empty" in malformed
    (too_long,) = [line for line in lines if "longer than" in line]
    assert too_long.startswith(f"training: skipped: 1 longer than 64 tokens: {path}, line 6 (")
    assert sum(data.train.examples(step) for step in range(data.train.steps_per_epoch)) == 6
