"""Comparisons end to end on a tiny model: groups, selected rates, cached and resumed runs, what they write."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

import lora_jax as lora
from experiments import command_line, configs, run
from experiments.configs.comparison import Comparison
from experiments.configs.intrinsic import Config as Intrinsic
from experiments.configs.which_weights import Config as WhichWeights
from experiments.errors import UserError
from experiments.models.virtual import Shape
from experiments.reports.page import Grid, Page, command
from experiments.reports.results import Outcome
from experiments.studies import dora, intrinsic, intrinsic_dimension, joint, rank, which_weights
from experiments.studies.comparison import figures, judge, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.problem import HEAD, Problem, accuracy, answers, load
from experiments.studies.rank_selection import Truncation

pytestmark = pytest.mark.usefixtures("lenient")

STUDIES = [
    name
    for name in command_line.config_names(configs)
    if isinstance(command_line.find_config(name).DEFAULTS, Comparison)
]


@dataclasses.dataclass(frozen=True)
class Config(Comparison):
    MINUTES = 1


def rows(config, problem):
    adapted = [
        Row(f"LoRA, r = {rank}", {"query/kernel": lora.LoRA(rank), HEAD: lora.Full()}, (1e-3, 1e-1), "LoRA", rank)
        for rank in (1, 2)
    ]
    full = Row("full", {"": lora.Full()}, (1e-2,), "full", 2, paper="9.9")
    few = Row("full, few examples", {"": lora.Full()}, (1e-2,), "few", 2, examples=24, epochs=2, batch_size=8)
    return [Row("head alone", {}, series="head alone", position=0), *adapted, full, few]


def findings(summaries):
    return [judge.better("LoRA is better than the head", summaries[1], summaries[0])]


STUDY = Study("LoRA wins.", "a paper, table 1", rows, partial(figures.lines, xlabel="rank"), findings, paper="paper")


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_data):
    return Config(
        model=str(tiny_model),
        data=str(tiny_data),
        train_examples=48,
        validation_examples=None,
        test_examples=None,
        seeds=2,
        lengths=(12,),
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, program.run(config, STUDY)


def test_every_row_has_a_result_for_each_seed(finished):
    config, summaries = finished
    assert [summary.row.name for summary in summaries] == [row.name for row in rows(config, None)]
    assert [len(summary.results) for summary in summaries] == [1, 2, 2, 2, 2]
    assert [summary.parameters for summary in summaries[:3]] == [0, 32, 64]
    assert summaries[3].parameters == summaries[4].parameters > 1000
    record = json.loads((config.out / "run.json").read_text())
    assert [row["mean"] for row in record["rows"]] == [summary.mean for summary in summaries]
    assert record["findings"][0]["verdict"] in {"observed", "not observed", "not decided"}
    assert (config.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (config.out / "README.md").read_text()
    assert "| full | " in page and "9.9" in page and "LoRA wins (a paper, table 1)." in page


def test_validation_selects_the_rate_of_a_row(finished):
    config, summaries = finished
    for summary in summaries[1:3]:
        (rate,) = {outcome.lr for outcome in summary.results}
        slug = summary.row.name.lower().replace(", ", "-").replace(" = ", "-")
        scores = {}
        for path in config.out.glob(f"{slug}-lr-*-seed0-*/result.json"):
            outcome = Outcome.load(path)
            scores[outcome.lr] = outcome.validation_accuracy
        assert set(scores) == {1e-3, 1e-1} and scores[rate] == max(scores.values())


def test_a_stored_adapter_has_the_reported_accuracy(finished):
    config, summaries = finished
    problem = load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    for summary in summaries[2:4]:
        outcome = summary.results[1]
        slug = "full" if summary.row.name == "full" else "lora-r-2"
        (path,) = config.out.glob(f"{slug}-lr-{outcome.lr:g}-seed1-*/adapter")
        params = lora.merge(problem.base, lora.load(path, problem.base))
        apply = jax.jit(problem.apply)
        logits = answers(lambda *inputs: apply(params, *inputs)[0], problem.splits["test"], problem.lengths)  # noqa: B023
        assert accuracy(logits, problem.splits["test"]) == outcome.test_accuracy


def too_fast(config, problem):
    _, adapted, _, full, _ = rows(config, problem)
    return [
        Row("head alone", {}, series="head alone", position=0),
        adapted,
        dataclasses.replace(full, name="too fast", spec={"": lora.Full()}, rates=(1e30,)),
        Row("truncated", {}, series="LoRA", position=0.5, parent=adapted.name, finish=Truncation(0.5)),
    ]


def test_a_row_that_diverges_does_not_end_the_study(settings, tmp_path, capsys):
    config = dataclasses.replace(settings, out=tmp_path)

    def compare(summaries):
        return [judge.better("the fast one is better", summaries[2], summaries[1])]

    study = dataclasses.replace(STUDY, rows=too_fast, findings=compare)
    for draw in (partial(figures.lines, xlabel="rank"), figures.bars):
        summaries = program.run(config, dataclasses.replace(study, draw=draw))
        assert [summary.diverged for summary in summaries] == [0, 0, 2, 0]
        assert "too fast diverged" in capsys.readouterr().out
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["rows"][2]["mean"] is None and "| diverged |" in (tmp_path / "README.md").read_text()
    truncated = summaries[3]
    assert truncated.row.parent == summaries[1].row.name
    assert sum(node.rank or 0 for node in truncated.adapter().values()) <= 1


def test_fresh_runs_once_and_keeps_its_results(settings, tmp_path, monkeypatch):
    config = dataclasses.replace(settings, out=tmp_path, seeds=1)
    study = dataclasses.replace(
        STUDY, rows=lambda config, problem: too_fast(config, problem)[:2] + too_fast(config, problem)[3:]
    )
    program.run(config, study)
    trained, real = [], joint.train
    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: trained.append(1) or real(*args, **kwargs))
    again = program.run(dataclasses.replace(config, fresh=True), study)
    assert len(trained) == 1
    assert program.run(config, study) == again and len(trained) == 1


def test_a_rate_that_was_not_selected_is_tested_when_it_is(settings, finished, tmp_path, monkeypatch):
    config, summaries = finished
    shutil.copytree(config.out, tmp_path / "copy")
    (chosen,) = {outcome.lr for outcome in summaries[1].results}
    (other,) = {1e-3, 1e-1} - {chosen}

    def others(config, problem):
        return [dataclasses.replace(rows(config, problem)[1], rates=(other,))]

    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    one_seed = dataclasses.replace(config, out=tmp_path / "copy", seeds=1)
    study = dataclasses.replace(STUDY, rows=others, findings=lambda summaries: [])
    (summary,) = program.run(one_seed, study)
    assert np.isfinite(summary.mean) and summary.results[0].test_accuracy * 100 == pytest.approx(summary.mean)


def test_runs_of_one_kind_train_together(settings, tmp_path, monkeypatch):
    groups, real = [], joint.train_jointly

    def recorded(start, specs, rates, config, *args, **options):
        groups.append((len(specs), config.seed, config.batch_size))
        return real(start, specs, rates, config, *args, **options)

    monkeypatch.setattr("experiments.studies.comparison.runs.train_jointly", recorded)
    program.run(dataclasses.replace(settings, out=tmp_path), STUDY)
    assert groups == [(4, 0, 16), (1, 0, 16), (1, 0, 8), (2, 1, 16), (1, 1, 16), (1, 1, 8)]


def test_finished_runs_are_read_and_others_resumed(
    settings, finished, tmp_path, monkeypatch, interrupt_many_at, capsys
):
    config = dataclasses.replace(settings, out=tmp_path)
    interrupt_many_at(2, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        program.run(config, STUDY)
    summaries = program.run(config, STUDY)
    assert "resumed at step 2 of 3" in capsys.readouterr().out
    assert [summary.mean for summary in summaries] == [summary.mean for summary in finished[1]]
    assert not list(config.out.glob("group-*"))
    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert program.run(config, STUDY) == summaries
    for other in ({"clip": 0.5}, {"weight_decay": 0.1}):
        with pytest.raises(pytest.fail.Exception):
            program.run(dataclasses.replace(config, **other), STUDY)


def test_sizes_follow_the_shapes_of_the_model():
    def kernel(*shape):
        return {"kernel": np.zeros(shape)}

    # those of MiniLM
    attention = {name: kernel(384, 384) for name in ("query", "key", "value", "output")}
    layer = {"attention": attention, "feed_forward": {"up": kernel(384, 1536), "down": kernel(1536, 384)}}
    base = {"encoder": {"layers": {0: layer, 1: layer}}, "classifier": kernel(384, 3)}
    problem = Problem(print, base, {}, ("a", "b", "c"), (12,), Shape(2, 12, 32, 384), "")
    ranks = {row.name for row in which_weights.rows(WhichWeights(), problem)}
    assert {"q, r = 36", "q, v, r = 18", "q, k, v, o, r = 9", "feed-forward, r = 7", "all linear, r = 4"} <= ranks
    for rows in (rank.rows(rank.Config(), problem), dora.rows(dora.Config(), problem)):
        recipes = [recipe for row in rows for recipe in row.spec.values()]
        assert max(getattr(recipe, "rank", 0) for recipe in recipes) == 384
    assert "all linear, r = 5" in {row.name for row in rank.rows(rank.Config(full_rank=5), problem)}


@pytest.mark.parametrize("name", STUDIES)
def test_the_smallest_study(name, tiny_model, tiny_data, tmp_path, capsys):
    config = dataclasses.replace(
        type(command_line.find_config(name).DEFAULTS)(fast=True),
        model=str(tiny_model),
        data=str(tiny_data),
        validation_examples=30,
        test_examples=30,
        lengths=(12,),
        out=tmp_path,
    )
    importlib.import_module(config.STUDY).run(config)
    record = json.loads((tmp_path / "run.json").read_text())
    assert len(record["rows"]) > 1 and record["findings"]
    printed = capsys.readouterr().out
    assert all(finding["claim"] in printed for finding in record["findings"])
    assert all(np.isfinite(row["mean"]) for row in record["rows"])


def summary(name, scores, *, lr=1e-3):
    """A row with these accuracies on 1,000 examples, of which the first ones are answered correctly."""
    outcomes = [Outcome(name, seed, 10, 8, 1.0, score, score, lr) for seed, score in enumerate(scores)]
    correct = [np.arange(1000) < 1000 * score for score in scores if not np.isnan(score)]
    start = SimpleNamespace(result=SimpleNamespace(trained_parameters=3))
    return Summary(Row(name, {}, (lr,)), outcomes, correct, start)


def test_verdicts():
    high, low, wide = summary("high", [0.8, 0.81]), summary("low", [0.7, 0.71]), summary("wide", [0.6, 0.9])
    assert judge.better("", high, low).verdict == "observed"
    assert judge.better("", low, high).verdict == "not observed"
    assert judge.better("", wide, low).verdict == "not decided"
    assert judge.as_good("", high, low).verdict == "observed"
    assert judge.as_good("", low, high).verdict == "not observed"
    assert judge.as_good("", wide, high).verdict == "not decided"
    assert judge.better("", summary("alone", [0.9]), low).verdict == "observed"  # the error over examples
    assert high.parameters == 7 and high.mean == pytest.approx(80.5)
    diverged = summary("diverged", [np.nan, np.nan])
    assert judge.better("", diverged, low).verdict == "not decided"
    assert judge.as_good("", low, diverged).figures.startswith("diverged diverged")
    assert judge.best([diverged, low, high]) is high and judge.best([diverged]) is diverged
    assert summary("half", [0.5, np.nan]).diverged == 1


def test_a_finding_has_a_reason_only_if_it_is_not_observed(tmp_path):
    high, low = summary("high", [0.8, 0.81]), summary("low", [0.7, 0.71])
    observed, refuted = (judge.better("wins", *pair).because("chance") for pair in ((high, low), (low, high)))
    assert observed.reason == "" and "reason" not in str(observed)
    assert refuted.reason == "chance" and str(refuted).endswith("Likely reason: chance")
    grid = Grid(["method"], [["LoRA"]])
    page = Page("LoRA wins.", "a paper", "", grid, [observed, refuted], lambda figure: None)
    page.publish(Config(out=tmp_path), {"devices": ["cpu"], "versions": {"jax": "1"}}, Console(quiet=True))
    assert (tmp_path / "README.md").read_text().count("Likely reason: chance") == 1
    findings = json.loads((tmp_path / "run.json").read_text())["findings"]
    assert [finding["reason"] for finding in findings] == ["", "chance"]


def test_the_intrinsic_dimension():
    problem = SimpleNamespace(reported="test", task=SimpleNamespace(metric=SimpleNamespace(title="accuracy")))
    start = SimpleNamespace(problem=problem, result=SimpleNamespace(trained_parameters=3))
    head = dataclasses.replace(summary("head", [0.6]), row=Row("head alone", {}, position=0), start=start)

    def subspaces(form, scores):
        return [
            dataclasses.replace(summary(form, [score]), row=Row(form, {}, (1e-3,), form, position=size))
            for size, score in scores.items()
        ]

    said = subspaces(intrinsic_dimension.SAID, {16: 0.62, 128: 0.69, 1024: 0.71})
    plain = subspaces(intrinsic_dimension.PLAIN, {16: 0.6, 128: 0.62, 1024: np.nan})
    rows = [head, *said, *plain, summary("full", [0.699])]
    names = ("90 % of the score", "90 % of the gain")
    assert intrinsic_dimension.thresholds(rows)[names[0]].mean == pytest.approx(62.91)
    assert intrinsic_dimension.thresholds(rows)[names[1]].mean == pytest.approx(68.91)
    assert intrinsic_dimension.d90(rows) == {
        intrinsic_dimension.SAID: dict(zip(names, (128, 128))),
        intrinsic_dimension.PLAIN: dict(zip(names, (None, None))),
    }
    easy = [*rows[:-1], summary("full", [0.65])]  # the head alone reaches 58.5
    assert [size[names[0]] for size in intrinsic_dimension.d90(easy).values()] == [0, 0]
    assert intrinsic_dimension.findings(easy)[0].verdict == "not decided"
    claims = intrinsic_dimension.findings(rows)
    assert claims[0].verdict == "observed" and "head alone has 60.0" in claims[0].figures
    assert len(claims) == 4 and all(claim.reason for claim in claims if claim.verdict == "not observed")
    cells = intrinsic_dimension.grid(rows).rows
    dimensions = ["128", "none of these"]
    assert [row[1:] for row in cells[3:7]] == [["71.0", "diverged"], ["69.9"] * 2, dimensions, dimensions]
    assert cells[0] == ["head alone", "60.0", "60.0"] and cells[1][0] == "d = 16"


def test_the_error_is_paired_over_examples_and_seeds():
    one, other = summary("one", [0.8, 0.6, 0.7]), summary("other", [0.7, 0.5, 0.6])
    points, error = judge.difference(one, other)
    assert points == pytest.approx(10)
    by_example = np.mean([np.array(a, float) - b for a, b in zip(one.contributions, other.contributions)], axis=0)
    assert error == pytest.approx(100 * by_example.std(ddof=1) / np.sqrt(1000))  # the seeds agree


def test_a_subspace_has_more_coordinates_than_layers(settings):
    problem = load(settings.model, settings.data, dict.fromkeys(("train", "test")), settings.lengths, str)
    with pytest.raises(UserError, match="dimensions: dimension=2, expected more than the 2 scales"):
        intrinsic.rows(Intrinsic(dimensions=(2, 16)), problem)


def test_the_page_states_the_command():
    assert command(WhichWeights(seeds=2, lengths=(14, 20), fresh=True)) == (
        "python -m experiments.run which-weights --seeds 2 --lengths 14 20"
    )


def test_what_the_user_can_put_right_is_one_sentence(tmp_path, capsys):
    for flags, message in (
        (["which-weights", "--budget", "7"], "budget must be a multiple of 12"),
        (["rank", "--seeds", "0"], "seeds must be positive"),
        (["low-data", "--sizes", "10", "20"], "size_epochs must be a positive number for each of the 2 sizes"),
        (["intrinsic", "--dimensions", "32", "16"], "dimensions must be ascending, not 32 16"),
        (["low-data", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)], "no such data directory"),
    ):
        assert run.main(flags) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
