"""The table, the findings and the figure of the study."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.configs.data_to_text import Config
from experiments.reports.findings import Finding, Verdict
from experiments.reports.page import Grid, Page
from experiments.studies.comparison.judge import STANDARD_ERRORS
from experiments.studies.sft.held_out import SHOTS as _COUNT

BASE, SHOTS = "base", f"base, {_COUNT} examples"
QUERY_VALUE, LINEAR = "LoRA, query and value", "LoRA, all linear"
_TITLES = {
    "debian_tags": "tags to synopsis",
    "debian_synopses": "description to synopsis",
    "sql_questions": "question to SQL",
}
_PAPER = {
    "debian_tags": [
        ["E2E: paper's LoRA", "0.35M", "71.8", "70.4", "–", "–"],
        ["E2E: paper's full model", "354.92M", "71.0", "68.2", "–", "–"],
    ],
    "debian_synopses": [
        ["SAMSum: paper's LoRA", "4.7M", "45.9", "–", "–", "–"],
        ["SAMSum: paper's full model", "175B", "44.5", "–", "–", "–"],
    ],
    "sql_questions": [
        ["WikiSQL: paper's LoRA", "4.7M", "–", "–", "73.4", "–"],
        ["WikiSQL: paper's full model", "175B", "–", "–", "73.8", "–"],
    ],
}
"""The paper's rows of the table (GPT-2 M, table 3; GPT-3, table 4)."""


@dataclass(frozen=True)
class Measured:
    """The scores of a method on a task, from 0 to 100 except the perplexity.

    Attributes:
      task: The name of the task's data.
      method: The method.
      parameters: The number of trained parameters.
      perplexity: Perplexity per token of the reference answers.
      rouge_l: Mean F-measure of ROUGE-L.
      bleu: Corpus BLEU.
      logical_form: Accuracy of the queries' forms; None for tasks without queries.
      execution: Accuracy of the queries' results.
      error: The standard error of :attr:`score`.
    """

    task: str
    method: str
    parameters: int
    perplexity: float
    rouge_l: float
    bleu: float
    logical_form: float | None
    execution: float | None
    error: float

    @property
    def score(self) -> float:
        """The score that decides: the accuracy of results for queries, otherwise ROUGE-L."""
        return self.rouge_l if self.execution is None else self.execution


def page(config: Config, rows: Sequence[Measured]) -> Page:
    """Returns the results page."""
    return Page(
        claim="LoRA generates text and SQL from data as well as full fine-tuning, with a fraction of its parameters",
        source="LoRA, tables 3 and 4 (GPT-2 M on E2E; GPT-3 on WikiSQL and SAMSum)",
        conditions=f"{config.model}, {config.test_examples} test examples of each task, greedy answers of at most "
        f"{config.new_tokens} tokens, one seed; LoRA of rank {config.rank}, {config.steps} steps of one sequence of "
        f"{config.length} tokens. The tables of the test questions are on other topics than those of training. Form "
        "and result are the percentages of the queries with the right logical form and, executed by sqlite3, with the "
        "right result. Below the measured rows of each task are the paper's for the data that the task is like.",
        grid=_grid(rows),
        findings=_findings(rows),
        draw=lambda figure: _draw(figure, rows),
        entries={"rows": list(map(asdict, rows))},
        size=(11.0, 4.2),
    )


def _grid(rows: Sequence[Measured]) -> Grid:
    cells = []
    for task in dict.fromkeys(row.task for row in rows):
        for row in (row for row in rows if row.task == task):
            scores = (row.rouge_l, row.bleu, row.logical_form, row.execution)
            texts = ["–" if score is None else f"{score:.1f}" for score in scores]
            cells.append([f"{task.split('_')[1]}: {row.method}", f"{row.parameters:,}", *texts])
        cells += _PAPER[task]
    return Grid(["", "parameters", "ROUGE-L", "BLEU", "form", "result"], cells)


def _findings(rows: Sequence[Measured]) -> list[Finding]:
    findings = []
    for task in dict.fromkeys(row.task for row in rows):
        by_method = {row.method: row for row in rows if row.task == task}
        best = max((by_method[QUERY_VALUE], by_method[LINEAR]), key=lambda row: row.score)
        prompted = max((row for name, row in by_method.items() if row.parameters == 0), key=lambda row: row.score)
        findings.append(_better(f"{_TITLES[task]}: LoRA is better than a prompt", best, prompted))
        title = f"{_TITLES[task]}: all linear layers are better than query and value"
        findings.append(_better(title, by_method[LINEAR], by_method[QUERY_VALUE]))
    missing = "not run: sft trains adapters only"
    return [*findings, Finding("LoRA is as good as full fine-tuning", "not decided", missing)]


def _better(claim: str, one: Measured, other: Measured) -> Finding:
    points, error = one.score - other.score, math.hypot(one.error, other.error)
    verdict: Verdict = "observed" if points > STANDARD_ERRORS * error else "not decided"
    name = "ROUGE-L" if one.execution is None else "accuracy of results"
    figures = f"{name}, {one.method} minus {other.method}: {points:+.1f} ± {error:.1f}"
    return Finding(claim, "not observed" if points < -STANDARD_ERRORS * error else verdict, figures)


def _draw(figure: Figure, rows: Sequence[Measured]) -> None:
    """Draws the scores of each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    colors = {BASE: "#bbbbbb", SHOTS: "#888888", QUERY_VALUE: "#9ecae9", LINEAR: "#4c78a8"}
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        group = [row for row in rows if row.task == task]
        places = np.arange(len(group))
        axes.bar(
            places,
            [row.score for row in group],
            yerr=[row.error for row in group],
            color=[colors[row.method] for row in group],
        )
        axes.set_xticks([])
        axes.set(title=_TITLES[task], ylabel="ROUGE-L" if group[0].execution is None else "right results, %")
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=color, label=method) for method, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(colors), edgecolor="none")
