"""The results of the study: a table, a figure, JSON, and examples."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.reports.results import read_record, write_json
from experiments.studies.embed.pairs import Pairs
from experiments.studies.embed.retrieval import gain, recall

COUNTS = (1, 10)
AIM = 0.05
"""The gain in recall@1 that the study aims at."""

_COLORS = ("#888888", "#4c78a8", "#f58518", "#54a24b")
_SHOWN, _WIDTH = 3, 100  # examples, and their characters


@dataclass(frozen=True)
class Result:
    """The base, or one run of one method.

    Attributes:
      method: The name in the table.
      trained_parameters: Number of trained scalars.
      seconds: Time of training and evaluation, including compilation.
      ranks: The rank of the answer of each test query, from 0.
      nearest: The index of the nearest answer of each test query.
      losses: The loss of every training step.
      evaluations: Pairs (step, validation recall@1).
    """

    method: str
    trained_parameters: int
    seconds: float
    ranks: list[int]
    nearest: list[int]
    losses: list[float]
    evaluations: list[tuple[int, float]]

    def save(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Reads a result that :meth:`save` wrote."""
        return read_record(path, cls, {"evaluations": tuple})


def table(results: Sequence[Result]) -> Table:
    """Returns costs and recall of the base, which comes first, and of each method."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("method")
    for name in ("trained\nparameters", "seconds", *(f"recall@{count}\n%" for count in COUNTS), "gain in\nrecall@1"):
        rows.add_column(name, justify="right", no_wrap=True)
    for result in results:
        costs = [f"{result.trained_parameters:,}", f"{result.seconds:.0f}"] if result.losses else ["–", "–"]
        change = str(gain(results[0].ranks, result.ranks, 1)) if result.losses else ""
        rows.add_row(result.method, *costs, *(str(recall(result.ranks, count)) for count in COUNTS), change)
    return rows


def verdicts(results: Sequence[Result]) -> list[str]:
    """Returns a line for each method that says whether it reaches the aim."""
    lines = []
    for result in results[1:]:
        change = gain(results[0].ranks, result.ranks, 1)
        reached = "reached" if change.value >= AIM else "NOT reached"
        lines.append(f"{result.method}: {change} points of recall@1; the aim of {100 * AIM:+.0f} points is {reached}")
    return lines


def record(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns the results as JSON, with standard errors and paired differences from the base."""
    rows = []
    for result in results:
        row = {key: value for key, value in asdict(result).items() if key not in ("ranks", "nearest")}
        row |= {f"recall@{count}": asdict(recall(result.ranks, count)) for count in COUNTS}
        if result.losses:
            row |= {f"gain@{count}": asdict(gain(results[0].ranks, result.ranks, count)) for count in COUNTS}
        rows.append(row)
    return rows


def show_examples(console: Console, results: Sequence[Result], pairs: Pairs) -> None:
    """Prints queries whose nearest answer a method changes, first those that it corrects."""
    before, after = results[0], results[1]
    changed = np.flatnonzero(np.array(before.nearest) != np.array(after.nearest))
    corrected = [index for index in changed if after.ranks[index] == 0]
    others = [index for index in changed if after.ranks[index] > 0]
    for index in [*corrected, *others][:_SHOWN]:
        pair = pairs.texts[index]
        console.print(_short(pair.anchor), style="bold", highlight=False)
        for result in (before, after):
            nearest = pairs.texts[result.nearest[index]].positive
            console.print(f"  {result.method}: {_short(nearest)}", highlight=False)
        console.print(f"  right: {_short(pair.positive)}", highlight=False)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 2]} …"


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Writes a PNG: test recall with standard errors on the left, validation recall over training on the right."""
    canvas = Canvas(figsize=(11, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2)
    width = 0.8 / len(results)
    for number, (color, result) in enumerate(zip(_COLORS, results)):
        figures = [recall(result.ranks, count) for count in COUNTS]
        at = np.arange(len(COUNTS)) + width * (number - (len(results) - 1) / 2)
        values, errors = [100 * figure.value for figure in figures], [100 * figure.error for figure in figures]
        left.bar(at, values, 0.92 * width, yerr=errors, color=color, capsize=3, label=result.method)
        for x, value, error in zip(at, values, errors):
            left.text(x, value + error + 1, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
        if result.losses:
            steps, scores = zip(*result.evaluations)
            right.plot(steps, [100 * score for score in scores], color=color, marker="o", label=result.method)
    left.set_xticks(range(len(COUNTS)), [f"recall@{count}" for count in COUNTS])
    left.set(ylabel="test queries, %", title="test, ± standard error", ylim=(0, 120), yticks=range(0, 101, 20))
    right.set(xlabel="step", ylabel="validation recall@1, %", title="during training")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, right):
        _finish(axes)
    canvas.suptitle(title)
    canvas.savefig(path)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", ncols=4)
