"""LoRA's accuracy by rank and learning rate: on validation of all, on test of the best learning rate of each rank."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

import lora_jax as lora
from experiments.baselines.specs import QUERY_VALUE
from experiments.configs.sweep import Config
from experiments.reports.findings import Finding
from experiments.reports.grid import draw_grid
from experiments.reports.page import Grid
from experiments.reports.table import short
from experiments.studies.comparison import program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.problem import HEAD, Problem

_TOLERANCE = 2.0  # a factor of learning rates that are about the same


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns a row for each rank."""
    return [
        Row(f"{rank}", {QUERY_VALUE: lora.LoRA(rank, alpha=config.alpha), HEAD: lora.Full()}, config.learning_rates)
        for rank in config.ranks
    ]


def best(summaries: Sequence[Summary]) -> Summary:
    """Returns the row with the best validation score."""
    return max(summaries, key=lambda summary: np.nan_to_num(list(summary.tried.values()), nan=-np.inf).max())


def grid(summaries: Sequence[Summary]) -> Grid:
    """Returns the validation score by rank (down) and learning rate (across), and the test score of the best."""
    rates = list(summaries[0].tried)
    rows = []
    for summary in summaries:
        cells = ["diverged" if np.isnan(score) else f"{100 * score:.1f}" for score in summary.tried.values()]
        rows.append([summary.row.name, *cells, f"{summary.mean:.1f}"])
    title = f"{summaries[0].title.removesuffix(', %')} of the best, %"
    return Grid(["rank", *map(short, rates), title], rows)


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Says whether the best learning rate depends on the rank, and which adapter is the best."""
    rates = [summary.results[0].lr or 0.0 for summary in summaries]
    chosen = best(summaries)
    about = ", ".join(f"{short(rate)} (rank {summary.row.name})" for rate, summary in zip(rates, summaries))
    return [
        Finding(
            "with the same alpha, the best learning rate hardly depends on the rank",
            "observed" if max(rates) / min(rates) <= _TOLERANCE else "not observed",
            about,
        ),
        Finding(
            "an adapter of the grid is better than the head alone",
            "observed" if chosen.mean > 100 * chosen.start.result.test_accuracy else "not observed",
            f"rank {chosen.row.name}, learning rate {short(chosen.results[0].lr or 0.0)}: {chosen.mean:.1f}; the head: "
            f"{100 * chosen.start.result.test_accuracy:.1f}",
        ),
    ]


def draw(figure: Figure, summaries: Sequence[Summary]) -> None:
    """Draws the validation scores as a heat map, with the best one marked."""
    scores = np.array([list(summary.tried.values()) for summary in summaries])
    rates = [short(rate) for rate in summaries[0].tried]
    chosen = divmod(int(np.nanargmax(scores)), len(rates))
    ranks = [summary.row.name for summary in summaries]
    score = f"validation {summaries[0].task.metric.title}"
    draw_grid(figure, scores, ranks, rates, labels=("rank", "peak learning rate"), score=score, chosen=chosen)


STUDY = Study(
    claim="With the same alpha, one learning rate serves all ranks",
    source="LoRA Without Regret; validation accuracy in percent",
    rows=rows,
    draw=draw,
    findings=findings,
    grid=grid,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
