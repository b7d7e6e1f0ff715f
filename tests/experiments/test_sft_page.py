"""The page of supervised fine-tuning: its table, findings and figure, from given scores."""

import doctest
import io
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from experiments.configs.sft import Config
from experiments.evaluation.scores import Scores
from experiments.reports import verdicts
from experiments.reports.page import command
from experiments.studies.sft import evaluation
from experiments.studies.sft.page import Trained, grid, page


def trained(name, rouge, *, quantize="none", merged=None, base=17.5):
    scores = [Scores(evaluation.TUNED, 200, 10.9, rouge, 1.6, 7.9)]
    scores.append(Scores(evaluation.MERGED, 200, 10.9, merged or rouge, 1.6, 7.9))
    if base:
        before = ((evaluation.BASE, base), (evaluation.BASE_SHOTS, base + 1.1))
        scores = [*(Scores(row, 200, 38.3, score, 1.0, 2.9) for row, score in before), *scores]
    return Trained(name, quantize, 10, 60.0, 2.5, scores, [3.0, 2.8, 2.6], [(0, 3.5), (3, 2.5)])


def test_the_page_of_one_method():
    result = page(Config(test_examples=200), [trained("lora", 32.2)])
    assert [row[0] for row in result.grid.rows] == [evaluation.BASE, evaluation.BASE_SHOTS, "lora", "lora, merged"]
    assert result.grid.rows[-1][1:] == ["–", "–", "–", "10.9", "32.2 ± 1.6", "7.9"]
    assert result.grid.rows[-2][1:] == ["10", "60", "2.500", "10.9", "32.2 ± 1.6", "7.9"]
    assert [finding.verdict for finding in result.findings] == ["observed"] * 3
    assert "+14.7" in result.findings[0].figures and "200 test examples" in result.conditions
    result.draw(figure := Figure())
    assert len(figure.axes[0].lines) == 3  # the losses, their smoothed mean, and validation


def test_methods_are_compared_with_the_first():
    results = [trained("lora", 32.2), trained("qlora", 25.0, quantize="nf4", merged=24.0, base=24.0)]
    names = [row[0] for row in grid(results).rows]
    shots = evaluation.BASE_SHOTS
    assert names == ["base", shots, "base (nf4)", f"{shots} (nf4)", "lora", "lora, merged", "qlora", "qlora, merged"]
    verdicts = {finding.claim: finding.verdict for finding in page(Config(), results).findings}
    assert verdicts["qlora is as good as lora"] == "not observed"
    assert verdicts["qlora is better than the base"] == "not decided"
    assert verdicts["qlora: the merged adapter has the scores of the unmerged one"] == "not observed"
    one = page(Config(), [results[0], trained("dora", 32.0, base=None)])
    assert [finding.claim for finding in one.findings][3:] == [
        "dora is as good as lora",
        "dora: the merged adapter has the scores of the unmerged one",
    ]


def test_numbers_are_whole_on_a_narrow_screen():
    """The names of methods are wrapped, and those of columns."""
    wide = replace(trained("full", 32.2), trained_parameters=134_515_008)
    console = Console(width=80, file=io.StringIO())
    console.print(grid([wide]).table())
    shown = console.file.getvalue()
    assert "134,515,008" in shown and "32.2 ± 1.6" in shown and "…" not in shown


def test_the_command_states_flags_of_groups():
    config = Config(test_examples=200, methods=("lora", "dora"))
    assert command(config) == "python -m experiments.run sft --methods lora dora --test-examples 200"


def test_the_conditions_are_those_of_the_run():
    result = trained("lora", 32.2)
    of = {
        config: page(config, [result]).conditions
        for config in (Config(), Config(method="full"), Config(methods=("full",)), Config(methods=("lora", "full")))
    }
    assert ["rank 16" in text for text in of.values()] == [True, False, False, True]
    assert all("of the step with the smallest validation loss." in text for text in of.values())
    assert "from runs/old" in page(Config(init_from=Path("runs/old")), [result]).conditions
    alone = page(Config(), [replace(result, validation_loss=None, evaluations=[])]).conditions
    assert "The scores are of the last step." in alone
    unscored = page(Config(), [replace(result, scores=[])]).conditions
    assert unscored == "smollm2-135m on debian_synopses:0.06; rank 16, 3 steps. Training took 1 minutes."


def test_examples_in_docstrings():
    assert doctest.testmod(verdicts).failed == 0
