"""Figures of comparisons: scores against parameters or another setting, and bars."""

from collections.abc import Sequence
from typing import Literal

from matplotlib.figure import Figure

from experiments.studies.comparison.description import Summary

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#eeca3b", "#1f3d66")


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
        color = _COLORS[index % len(_COLORS)]
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
    colors = [_COLORS[series.index(row.row.series) % len(_COLORS)] for row in rows]
    axes.barh(
        [row.row.name for row in rows], [row.mean for row in rows], xerr=[row.deviation for row in rows], color=colors
    )
    lowest = min(row.mean - row.deviation for row in rows)
    highest = max(row.mean + row.deviation for row in rows)
    margin = 0.1 * max(highest - lowest, 1.0)
    axes.set(xlabel=summaries[0].title, xlim=(lowest - margin, highest + margin))
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
