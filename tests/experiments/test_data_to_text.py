"""Data to text end to end on a tiny model: what it writes, reads again, and concludes."""

import dataclasses
import json

import pytest

from experiments import run as entry
from experiments.configs.data_to_text import Config
from experiments.studies.data_to_text import report, study
from experiments.studies.data_to_text.report import BASE, LINEAR, QUERY_VALUE, SHOTS, Measured
from experiments.studies.sft import study as sft_study

pytestmark = pytest.mark.usefixtures("lenient")


def test_the_smallest_study_and_its_results_again(tmp_path, monkeypatch, capsys):
    config = Config(fast=True, out=tmp_path)
    rows = study.run(config)
    assert [(row.task, row.method) for row in rows] == [
        (task, method) for task in config.tasks for method in (BASE, QUERY_VALUE, LINEAR)
    ]
    assert all((row.execution is None) == (row.task == "debian_tags") for row in rows)
    assert 0 == rows[0].parameters < rows[1].parameters < rows[2].parameters
    record = json.loads((tmp_path / "run.json").read_text())
    assert [row["rouge_l"] for row in record["rows"]] == [row.rouge_l for row in rows]
    page = (tmp_path / "README.md").read_text()
    assert "| WikiSQL: paper's LoRA | 4.7M | – | – | 73.4 | – |" in page and f"| questions: {LINEAR} |" in page
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.setattr(sft_study, "_train", lambda *args: pytest.fail("trained again"))
    assert study.run(config) == rows


def measured(method, score, *, task="debian_tags", error=1.0, parameters=0):
    return Measured(task, method, parameters, 9.0, score, 0.0, None, None, error)


def test_verdicts():
    rows = [
        measured(BASE, 10.0),
        measured(SHOTS, 12.0),
        measured(QUERY_VALUE, 20.0, parameters=5),
        measured(LINEAR, 21.0, parameters=9),
    ]
    prompt, linear, full = report._findings(rows)
    assert prompt.verdict == "observed" and f"{LINEAR} minus {SHOTS}: +9.0 ± 1.4" in prompt.figures
    assert linear.verdict == "not decided" and full.verdict == "not decided"
    worse = [*rows[:2], dataclasses.replace(rows[2], rouge_l=30.0), rows[3]]
    assert report._findings(worse)[1].verdict == "not observed"


def test_what_the_user_can_put_right_is_one_sentence(capsys):
    assert entry.main(["data-to-text", "--tasks", "e2e"]) == 2
    message = "tasks must be one or more of debian_tags, debian_synopses, sql_questions, each once; got e2e"
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
