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
    others = [f"{metric.title}, %" for metric in summaries[0].task.metrics[1:]]
    scores = [summaries[0].title, *others]
    header = ["method", "trained parameters", "adapter file", *(["rate"] if several else []), *scores]
    rows = []
    for summary in summaries:
        first = summary.results[0]
        rate = [short(first.lr) if first.lr is not None else "–"] if several else []
        row = [summary.row.name, f"{summary.parameters:,}", size(first.adapter_bytes), *rate, score(summary)]
        row += [f"{other:.1f}" for other in summary.others.values()] or ["–"] * len(others)
        rows.append([*row, summary.row.paper or "–"] if paper else row)
    return Grid([*header, paper] if paper else header, rows)


def as_json(summary: Summary) -> dict[str, Any]:
    """Returns the entry of a row."""
    row, metric = summary.row, summary.task.metric.name
    results = [asdict(outcome) for outcome in summary.results]
    for result in results:
        for name in ("losses", "evaluations"):  # of the head alone, which takes no steps
            result.pop(name, None)
        for split in ("validation", "test"):
            result[f"{split}_{metric}"] = result.pop(f"{split}_accuracy")
    return {
        "name": row.name,
        "series": row.series,
        "position": row.position,
        "paper": row.paper,
        "tried": {f"{rate:g}": score for rate, score in summary.tried.items()},
        "parameters": summary.parameters,
        "metric": metric,
        "mean": summary.mean,
        "standard_deviation": summary.deviation,
        "others": dict(summary.others),
        "diverged": summary.diverged,
        "results": results,
    }


def score(summary: Summary) -> str:
    """Returns the mean score of a row, its standard deviation over seeds, and how many diverged."""
    if not summary.contributions:
        return "diverged"
    mean = f"{summary.mean:.1f}"
    score = f"{mean} ± {summary.deviation:.1f}" if len(summary.contributions) > 1 else mean
    return f"{score} ({summary.diverged} of {len(summary.results)} diverged)" if summary.diverged else score
