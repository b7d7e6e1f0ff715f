"""The table of a comparison, and its entries of the JSON record."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments.reports.page import Grid
from experiments.reports.table import short, size
from experiments.studies.comparison.description import Summary


def grid(summaries: Sequence[Summary], paper: str) -> Grid:
    """Returns the table.

    Args:
      summaries: The results.
      paper: The heading of the paper's column; empty omits it.
    """
    several = any(len(summary.row.rates) > 1 for summary in summaries)
    header = ["method", "trained parameters", "adapter file", *(["rate"] if several else []), "test accuracy, %"]
    rows = []
    for summary in summaries:
        first = summary.results[0]
        rate = [short(first.lr) if first.lr is not None else "–"] if several else []
        row = [summary.row.name, f"{summary.parameters:,}", size(first.adapter_bytes), *rate, score(summary)]
        rows.append([*row, summary.row.paper or "–"] if paper else row)
    return Grid([*header, paper] if paper else header, rows)


def as_json(summary: Summary) -> dict[str, Any]:
    """Returns the entry of a row."""
    row = summary.row
    results = [asdict(outcome) for outcome in summary.results]
    for result in results:  # of the head alone, which takes no steps
        for name in ("losses", "evaluations"):
            result.pop(name, None)
    return {
        "name": row.name,
        "series": row.series,
        "position": row.position,
        "paper": row.paper,
        "tried": {f"{rate:g}": score for rate, score in summary.tried.items()},
        "parameters": summary.parameters,
        "mean": summary.mean,
        "standard_deviation": summary.deviation,
        "diverged": summary.diverged,
        "results": results,
    }


def score(summary: Summary) -> str:
    """Returns the mean accuracy of a row, its standard deviation over seeds, and how many diverged."""
    if not summary.correct:
        return "diverged"
    mean = f"{summary.mean:.1f}"
    score = f"{mean} ± {summary.deviation:.1f}" if len(summary.correct) > 1 else mean
    return f"{score} ({summary.diverged} of {len(summary.results)} diverged)" if summary.diverged else score
