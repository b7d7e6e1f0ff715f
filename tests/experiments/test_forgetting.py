"""The study of forgetting: differences with errors, verdicts, resumed runs."""

import doctest
import json
import math
import shutil

import numpy as np
import pytest

from experiments.configs.forgetting import Config
from experiments.studies.forgetting import losses, report, study
from experiments.studies.forgetting.losses import Losses
from experiments.studies.forgetting.report import FULL, LORA, Measured

pytestmark = pytest.mark.usefixtures("lenient")


def test_examples_in_docstrings():
    assert doctest.testmod(losses).failed == 0 < doctest.testmod(losses).attempted


def test_the_error_is_that_of_paired_examples():
    rng = np.random.default_rng(0)
    tokens, base = rng.integers(5, 50, 400), rng.normal(3, 1, 400)
    sums, other = (base + 0.2) * tokens, base * tokens + rng.normal(0, 3, 400)
    mean, error = Losses(sums, tokens).minus(Losses(base * tokens, tokens))
    assert mean == pytest.approx(0.2) and error == pytest.approx(0, abs=1e-9)
    mean, error = Losses(other, tokens).minus(Losses(base * tokens, tokens))
    assert error == pytest.approx(3 * math.sqrt(400) / tokens.sum(), rel=0.2) and abs(mean) < 4 * error
    assert math.isnan(Losses([1.0], [2]).minus(Losses([0.5], [2]))[1])


def measured(series, task, other, *, lr=1e-3, parameters=10):
    spread = np.linspace(-0.01, 0.01, 9)
    parts = (Losses(list(10 * (loss + spread * loss)), [10] * 9) for loss in (task, other))
    return Measured(f"{series}, {lr:g}", series, lr, parameters, 1.0, *parts)


@pytest.mark.parametrize(
    ("task", "other", "verdict"),
    [
        (1.0, 2.1, "observed"),
        (1.0, 2.5, "not observed"),
        (0.9, 2.5, "not decided"),  # LoRA forgets more and learns more
        (1.1, 2.1, "not decided"),
        (1.1, 2.5, "not observed"),
        (1.0, 2.3, "not decided"),
    ],
)
def test_verdicts(task, other, verdict):
    base, full = measured("base", 2.0, 2.0), measured(FULL, 1.0, 2.3, lr=1e-4)
    slow = measured(LORA, 1.5, 2.0)
    finding, rates = report._findings(Config(), base, [slow, measured(LORA, task, other, lr=3e-3), full])
    assert finding.verdict == verdict and bool(finding.reason) == (verdict == "not observed")
    assert rates.verdict == "observed" and "+" in rates.figures


def test_the_smallest_study_and_its_finished_runs(tmp_path, monkeypatch, capsys):
    config = Config(fast=True, out=tmp_path)
    rows = study.run(config)
    printed = capsys.readouterr().out
    assert [row.series for row in rows].count(FULL) == 1 and rows[0].parameters == 0
    assert rows[-1].parameters > 10 * rows[1].parameters
    assert all(np.isfinite([row.task.mean, row.other.mean]).all() for row in rows)
    assert not list(tmp_path.glob("*/checkpoints"))
    monkeypatch.setattr(study.study, "run", lambda config: pytest.fail("trained again"))
    monkeypatch.setattr(study, "measure", lambda *args: pytest.fail("measured again"))
    assert study.run(config) == rows
    record = json.loads((tmp_path / "run.json").read_text())
    assert [row["name"] for row in record["rows"]] == [row.name for row in rows]
    assert record["findings"] and all(finding["claim"] in printed for finding in record["findings"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "python -m experiments.run forgetting --fast" in (tmp_path / "README.md").read_text()
    shutil.rmtree(tmp_path / "dora-r-2")
    (tmp_path / "dora-r-2.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        study.run(config)
