"""The table, the findings and the figure of the study."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.configs.data_to_text import Config
from experiments.reports.findings import Finding
from experiments.reports.page import Grid, Page
from experiments.studies.data_to_text import published
from experiments.studies.sft.held_out import SHOTS as _COUNT
from experiments.studies.sft.judge import Scored, as_good, better

BASE, SHOTS = "base", "shots"
QUERY_VALUE, LINEAR, FULL = "query-value", "linear", "full"
TITLES = {
    BASE: "base",
    SHOTS: f"base, {_COUNT} examples",
    QUERY_VALUE: "LoRA, query and value",
    LINEAR: "LoRA, all linear",
    FULL: "full fine-tuning",
}
"""The names of methods in tables."""

_TASKS = {
    "debian_tags": "tags to synopsis",
    "debian_synopses": "description to synopsis",
    "sql_questions": "question to SQL",
    "e2e": "E2E",
    "wikisql": "WikiSQL",
    "samsum": "SAMSum",
}
_METRICS = {
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "nist": "NIST",
    "meteor": "METEOR",
    "ter": "TER",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "logical_form": "form",
    "execution": "result",
}
_COLORS = {BASE: "#bbbbbb", SHOTS: "#888888", QUERY_VALUE: "#9ecae9", LINEAR: "#4c78a8", FULL: "#f58518"}


@dataclass(frozen=True)
class Measured:
    """The scores of a method on a task.

    Attributes:
      task: The name of the task's data.
      method: The method, a key of `TITLES`.
      parameters: The number of trained parameters.
      perplexity: Perplexity per token of the reference answers.
      metrics: The metrics of the answers by name, from 0 to 100, except NIST.
      score: The metric that decides: the accuracy of queries, otherwise the mean ROUGE-L with the first reference.
      error: The standard error of the score.
    """

    task: str
    method: str
    parameters: int
    perplexity: float
    metrics: Mapping[str, float]
    score: float
    error: float

    @property
    def scored(self) -> Scored:
        """The score with its names."""
        measure = {"sql_questions": "right results, %", "wikisql": "right forms, %"}.get(self.task, "ROUGE-L")
        return Scored(TITLES[self.method], measure, self.score, self.error)


def page(config: Config, rows: Sequence[Measured]) -> Page:
    """Returns the results page."""
    return Page(
        claim="LoRA generates text and SQL from data as well as full fine-tuning, with a fraction of its parameters",
        source="LoRA, tables 3 and 4 (GPT-2 M and L on E2E; GPT-3 on WikiSQL and SAMSum)",
        conditions=_conditions(config),
        grid=_grid(rows),
        findings=_findings(rows),
        draw=lambda figure: _draw(figure, rows),
        entries={"rows": list(map(asdict, rows))},
        size=(11.0, 4.2),
    )


def _conditions(config: Config) -> str:
    count = "all" if config.test_examples is None else f"{config.test_examples}"
    search = "greedy answers" if config.beams == 1 else f"answers of a search with {config.beams} beams"
    sentences = [
        f"{config.model}, {count} test examples of each task, {search} of at most {config.new_tokens} tokens, one "
        f"seed; LoRA of rank {config.rank}; {config.extent()} of {config.length} tokens."
    ]
    tasks = config.sources()
    if "sql_questions" in tasks:
        sentences.append("The tables of the test questions are on other topics than those of training.")
    if {"sql_questions", "wikisql"} & {*tasks}:
        sentences.append(
            "Form and result are the percentages of the queries with the right logical form and, executed by sqlite3, "
            "with the right result."
        )
    same = "the same data" if config.data else "the data that the task is like"
    sentences.append(f"Below the measured rows of each task are the paper's for {same}.")
    if "e2e" in tasks:
        sentences.append("CIDEr is absent: no maintained package computes it. METEOR needs WordNet.")
    if config.paper:
        sentences += [published.NOTES[task] for task in tasks]
    return " ".join(sentences)


def _grid(rows: Sequence[Measured]) -> Grid:
    names = [name for name in _METRICS if any(name in row.metrics for row in rows)]
    cells = []
    for task in dict.fromkeys(row.task for row in rows):
        label = task.rpartition("_")[2] if task.startswith("debian") else _TASKS.get(task, task).partition(" ")[0]
        label = "questions" if task == "sql_questions" else label
        for row in (row for row in rows if row.task == task):
            scores = [
                f"{row.metrics[name]:.{2 if name == 'nist' else 1}f}" if name in row.metrics else "–" for name in names
            ]
            cells.append([f"{label}: {TITLES[row.method]}", f"{row.parameters:,}", *scores])
        for title, parameters, metrics in published.ROWS[task]:
            cells.append([title, parameters, *(metrics.get(name, "–") for name in names)])
    return Grid(["", "parameters", *(_METRICS[name] for name in names)], cells)


def _findings(rows: Sequence[Measured]) -> list[Finding]:
    findings = []
    for task in dict.fromkeys(row.task for row in rows):
        by_method = {row.method: row for row in rows if row.task == task}
        adapted = [by_method[name] for name in (QUERY_VALUE, LINEAR) if name in by_method]
        best = max(adapted, key=lambda row: row.score, default=None)
        prompted = [by_method[name] for name in (BASE, SHOTS) if name in by_method]
        if best is not None and prompted:
            prompt = max(prompted, key=lambda row: row.score)
            findings.append(better(f"{_TASKS[task]}: LoRA is better than a prompt", best.scored, prompt.scored))
        if len(adapted) == 2:
            title = f"{_TASKS[task]}: all linear layers are better than query and value"
            findings.append(better(title, by_method[LINEAR].scored, by_method[QUERY_VALUE].scored))
        if best is not None and FULL in by_method:
            title = f"{_TASKS[task]}: LoRA is as good as full fine-tuning"
            findings.append(as_good(title, best.scored, by_method[FULL].scored))
    return findings


def _draw(figure: Figure, rows: Sequence[Measured]) -> None:
    """Draws the scores of each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        group = [row for row in rows if row.task == task]
        axes.bar(
            np.arange(len(group)),
            [row.score for row in group],
            yerr=[row.error for row in group],
            color=[_COLORS[row.method] for row in group],
        )
        axes.set_xticks([])
        axes.set(title=_TASKS[task], ylabel=group[0].scored.measure)
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    drawn = [method for method in _COLORS if any(row.method == method for row in rows)]
    handles = [Patch(color=_COLORS[method], label=TITLES[method]) for method in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(drawn), edgecolor="none")
