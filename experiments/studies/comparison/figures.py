"""Figures of comparisons: scores against parameters or another setting, bars, and curves over steps."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from experiments.reports.curves import COLORS, finish, plot_losses
from experiments.studies.comparison.description import Summary
from experiments.training import record


def lines(
    figure: Figure,
    summaries: Sequence[Summary],
    *,
    xlabel: str = "trained parameters, without the head's",
    xscale: Literal["linear", "log"] = "log",
) -> None:
    """Draws the scores against the rows' positions: a line for each series, with standard deviations over seeds.

    A row without parameters of its own, such as the head alone, is a horizontal line.
    """
    axes = figure.subplots()
    series: dict[str, list[Summary]] = {}
    for summary in summaries:
        series.setdefault(summary.row.series or summary.row.name, []).append(summary)
    for index, (name, rows) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        if not any(row.x for row in rows):
            axes.axhline(rows[0].mean, color=color, linestyle="--", label=name)
            continue
        rows = sorted(rows, key=lambda row: row.x)
        axes.errorbar(
            [row.x for row in rows],
            [row.mean for row in rows],
            [row.deviation for row in rows],
            color=color,
            marker="o",
            markersize=5,
            capsize=2,
            label=name,
        )
    axes.set(xlabel=xlabel, ylabel=summaries[0].title, xscale=xscale)
    if all(summary.row.position is not None for summary in summaries if summary.row.rates):
        ticks = sorted({summary.x for summary in summaries if summary.row.rates})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, edgecolor="none", framealpha=0.85)


def bars(figure: Figure, summaries: Sequence[Summary]) -> None:
    """Draws a horizontal bar for each row that did not diverge, from the best to the worst, with standard deviations
    over seeds."""
    axes = figure.subplots()
    rows = sorted((row for row in summaries if row.contributions), key=lambda row: row.mean)
    series = list(dict.fromkeys(row.row.series for row in summaries))
    colors = [COLORS[series.index(row.row.series) % len(COLORS)] for row in rows]
    axes.barh(
        [row.row.name for row in rows], [row.mean for row in rows], xerr=[row.deviation for row in rows], color=colors
    )
    lowest = min(row.mean - row.deviation for row in rows)
    highest = max(row.mean + row.deviation for row in rows)
    margin = 0.1 * max(highest - lowest, 1.0)
    axes.set(xlabel=summaries[0].title, xlim=(lowest - margin, highest + margin))
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def curves(figure: Figure, summaries: Sequence[Summary]) -> None:
    """Draws the training loss on the left and the validation score on the right, of runs that train apart.

    Each row has a color; the mean over its seeds is drawn on top. The head alone is a horizontal line.
    """
    left, right = figure.subplots(1, 2)
    for color, summary in zip(COLORS, summaries):
        label = f"{summary.row.name} ({summary.start.problem.reported} {summary.mean:.1f} %)"
        before = 100 * summary.start.result.validation_accuracy
        if not summary.row.rates:
            right.axhline(before, color=color, linestyle="--", label=label)
            continue
        runs = [
            record.read(directory / record.METRICS)
            for directory, outcome in zip(summary.directories, summary.results)
            if not np.isnan(outcome.validation_accuracy)
        ]
        if not runs:
            continue
        plot_losses(left, color, summary.row.name, [_values(run, "loss")[1] for run in runs])
        steps = [0, *_values(runs[0], "validation")[0]]
        scores = [[before, *(100 * _values(run, "validation")[1])] for run in runs]
        if len(runs) > 1:
            right.plot(steps, np.transpose(scores), color=color, alpha=0.3, linewidth=0.8)
        right.plot(steps, np.mean(scores, axis=0), color=color, marker="o", markersize=4, label=label)
    left.set(xlabel="step", ylabel="training loss", title="loss")
    metric = summaries[0].task.metric.title
    right.set(xlabel="step", ylabel=f"validation {metric}, %", title=metric)
    for axes in (left, right):
        finish(axes)


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], np.ndarray]:
    """Returns the steps and the values of a metric."""
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in pairs], np.array([value for _, value in pairs])
