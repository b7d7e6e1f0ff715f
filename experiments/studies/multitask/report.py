"""The table, the findings and the figure of the study."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.configs.multitask import Config
from experiments.reports import verdicts
from experiments.reports.findings import Finding
from experiments.reports.page import Grid, Page
from experiments.reports.results import Outcome
from experiments.reports.table import size
from experiments.studies.multitask.problems import Task
from experiments.studies.multitask.serving import Served

_EQUAL = 1e-3  # differences of logits of up to so much are rounding
_SMALL = 0.1  # of the base


@dataclass(frozen=True)
class Results:
    """The results of the study, by task.

    Attributes:
      tasks: The tasks.
      heads: The outcomes of the heads alone.
      adapters: The outcomes of the adapters.
      full: The outcomes of full fine-tuning.
      served: What one batch for all tasks gives and costs.
    """

    tasks: Sequence[Task]
    heads: Sequence[Outcome]
    adapters: Sequence[Outcome]
    full: Sequence[Outcome]
    served: Served

    @property
    def base_bytes(self) -> int:
        """The bytes of the base on disk: those of a full model, which is stored in the same format."""
        return round(_bytes(self.full) / len(self.full))


def page(config: Config, results: Results) -> Page:
    """Returns the results page."""
    count, served = len(results.tasks), results.served
    return Page(
        claim="One base serves many tasks: adapters are as good as full models, take little disk and share one batch",
        source="LoRA, section 1: many small modules for different tasks share a pretrained model; routed as in Batched "
        "LoRA and Punica",
        conditions=f"{config.model} on {count} tasks of {config.data}: {config.train_examples:,} training and "
        f"{config.test_examples:,} test examples each, epochs: {config.epochs}, batch size {config.batch_size}, one "
        f"seed; LoRA of rank {config.rank} on all linear layers, trained in one step for all tasks. Every method "
        "starts from the task's head, which logistic regression fits to frozen features; majority is the label that "
        "is the most frequent one in training. Seconds include evaluation and compilation. A batch of "
        f"{count * config.rows} rows for all tasks takes {1000 * served.together:.0f} ms, one call for each adapter on "
        f"the same rows {1000 * served.separately:.0f} ms.",
        grid=_grid(results),
        findings=_findings(results),
        draw=lambda figure: _draw(figure, results),
        entries=_entries(results),
        size=(11.0, 4.6),
    )


def _grid(results: Results) -> Grid:
    header = ["test accuracy, %", "labels", "majority", "head", "adapter", "full model"]
    columns = [
        [task.majority for task in results.tasks],
        *([outcome.test_accuracy for outcome in group] for group in (results.heads, results.adapters, results.full)),
    ]
    rows = [
        [task.name, f"{task.labels}", *(f"{100 * value:.1f}" for value in values)]
        for task, *values in zip(results.tasks, *columns)
    ]
    rows.append(["mean", "", *(f"{100 * np.mean(column):.1f}" for column in columns)])
    stored = [results.base_bytes + _bytes(group) for group in (results.heads, results.adapters)]
    seconds = [f"{sum(outcome.seconds for outcome in group):.0f}" for group in (results.adapters, results.full)]
    rows.append(["bytes, base included", "", "", *map(size, stored), size(_bytes(results.full))])
    rows.append(["seconds of training", "", "", "", *seconds])
    return Grid(header, rows)


def _findings(results: Results) -> list[Finding]:
    differences = _points(results.adapters) - _points(results.full)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan
    adapters, base, served = _bytes(results.adapters), results.base_bytes, results.served
    together, apart = (sum(outcome.seconds for outcome in group) for group in (results.adapters, results.full))
    return [
        Finding(
            "adapters are as good as full models",
            verdicts.not_worse(mean, error),
            f"adapter minus full model: {mean:+.1f} ± {error:.1f} points, mean and standard error over the tasks",
        ),
        Finding(
            "another task takes little disk",
            "observed" if adapters / len(results.tasks) <= _SMALL * base else "not observed",
            f"{size(adapters / len(results.tasks))} for an adapter with its head, {size(base)} for a model: "
            f"{len(results.tasks)} tasks take {size(base + adapters)} instead of {size(_bytes(results.full))}",
        ),
        Finding(
            "one batch for all tasks gives what each adapter gives alone",
            "observed" if served.difference <= _EQUAL and served.agreement == 1 else "not observed",
            f"logits differ by at most {served.difference:.1e}; {served.agreement:.2%} of the predictions agree",
        ),
        Finding(
            "one batch for all tasks takes less time than a call for each adapter",
            "observed" if served.together < served.separately else "not observed",
            f"{served.separately / served.together:.2f} times as fast",
        ),
        Finding(
            "the adapters of all tasks train in less time than the full models",
            "observed" if together < apart else "not observed",
            f"{together:.0f} s instead of {apart:.0f} s",
        ),
    ]


def _points(group: Sequence[Outcome]) -> np.ndarray:
    return 100 * np.array([outcome.test_accuracy for outcome in group])


def _bytes(group: Sequence[Outcome]) -> int:
    return sum(outcome.adapter_bytes for outcome in group)


def _entries(results: Results) -> dict[str, Any]:
    rows = zip(results.tasks, results.heads, results.adapters, results.full)
    return {
        "tasks": [
            {
                "name": task.name,
                "labels": task.labels,
                "majority": task.majority,
                "head": head.test_accuracy,
                "adapter": adapter.test_accuracy,
                "full": full.test_accuracy,
                "adapter_parameters": adapter.trained_parameters,
                "adapter_bytes": adapter.adapter_bytes,
                "full_bytes": full.adapter_bytes,
                "adapter_seconds": adapter.seconds,
                "full_seconds": full.seconds,
            }
            for task, head, adapter, full in rows
        ],
        "base_bytes": results.base_bytes,
        "served": asdict(results.served),
    }


def _draw(figure: Figure, results: Results) -> None:
    """Draws the accuracies by task, and the bytes of the tasks."""
    left, right = figure.subplots(1, 2, width_ratios=(4, 1))
    places = np.arange(len(results.tasks))
    groups = {
        "head": (results.heads, "#bbbbbb"),
        "adapter": (results.adapters, "#4c78a8"),
        "full model": (results.full, "#f58518"),
    }
    for offset, (name, (group, color)) in zip((-0.27, 0.0, 0.27), groups.items()):
        left.bar(places + offset, _points(group), width=0.25, color=color, label=name)
    majorities = [100 * task.majority for task in results.tasks]
    left.hlines(majorities, places - 0.4, places + 0.4, color="black", linewidth=1, label="majority")
    left.set_xticks(places, [task.name for task in results.tasks])
    left.set(ylabel="test accuracy, %", ylim=(0, 100))
    left.legend(fontsize=8, ncols=4, edgecolor="none", loc="upper center")
    totals = {"adapters": results.base_bytes + _bytes(results.adapters), "full models": _bytes(results.full)}
    right.bar([*totals], [total / 1e6 for total in totals.values()], color=["#4c78a8", "#f58518"])
    right.bar(["adapters"], [results.base_bytes / 1e6], color="#9ecae9", label="the base")
    right.set(ylabel="MB on disk")
    right.legend(fontsize=8, edgecolor="none")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
