"""The results of a study of post-training: a table, a figure and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.studies.decoder.report import RunReport
from experiments.studies.post_training.task import Aim
from experiments.training.run import History

ADAPTER, PEFT, RESULT, FIGURE = "adapter", "peft", "result.json", "figure.png"
_BASE, _TUNED = "#888888", "#4c78a8"
_WINDOW = 10  # steps over which a curve is smoothed
_WIDTH = 100  # characters of a sample


@dataclass(frozen=True, kw_only=True)
class Report(RunReport):
    """The result of a run. Evaluations are means of the aim's measure on the held-out records; texts are tuples
    (prompt, answer of the base, answer of the adapter).

    Attributes:
      means: The means of the objective's metrics of every training step, by name.
      before: The base's values by measure, one for each held-out record.
      after: The adapter's.
    """

    means: dict[str, list[float]]
    before: dict[str, list[float]]
    after: dict[str, list[float]]

    @property
    def history(self) -> History:
        return History(self.losses, self.evaluations, self.seconds, self.means)


def mean_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Returns the mean of values and its standard error.

    Example:
      >>> [round(number, 3) for number in mean_error([0.0, 1.0, 1.0, 1.0])]
      [0.75, 0.25]
    """
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else float("nan")


def change(report: Report, measure: str) -> tuple[float, float]:
    """Returns the change of a measure from base to adapter and its standard error, of paired differences."""
    return mean_error(np.subtract(report.after[measure], report.before[measure]))


def table(report: Report) -> Table:
    """Returns each measure of base and adapter, with standard errors."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("held-out")
    for name in ("base", "adapter", "change"):
        rows.add_column(name, justify="right", no_wrap=True)
    for name in report.before:
        both = (mean_error(report.before[name]), mean_error(report.after[name]))
        value, error = change(report, name)
        rows.add_row(name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in both), f"{value:+.3f} ± {error:.3f}")
    return rows


def verdict(report: Report, aim: Aim) -> str:
    """Returns a sentence that says whether a study reaches its aim."""
    value, error = change(report, aim.measure)
    least = 2 * error if aim.change is None else aim.change
    what = "twice the standard error" if aim.change is None else f"{aim.change:+g}"
    reached = "reached" if value >= least and value > 0 else "NOT reached"
    return f"{aim.measure}: {value:+.3f} ± {error:.3f} over the base; the aim of {what} is {reached}"


def show(report: Report, aim: Aim, console: Console) -> None:
    """Prints a report."""
    for prompt, *answers in report.texts:
        console.print(_short(prompt), style="bold", highlight=False)
        for name, answer in zip(("base", "adapter"), answers):
            console.print(f"  {name}: {_short(answer)}", highlight=False)
    console.print(table(report))
    count = len(report.before[aim.measure])
    console.print(
        f"{count:,} held-out records, ± standard error; {len(report.losses):,} steps in {report.seconds:.0f} s",
        highlight=False,
    )
    console.print(verdict(report, aim), highlight=False, soft_wrap=True)


def draw(path: Path, report: Report, aim: Aim, curve: str, title: str) -> None:
    """Writes a PNG: a mean of the objective over steps on the left, the aim's held-out measure on the right."""
    canvas = Canvas(figsize=(9.5, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2, width_ratios=(2, 1))
    values = np.array(report.means[curve])
    left.plot(np.arange(1, len(values) + 1), values, color=_TUNED, alpha=0.3, linewidth=0.8)
    window = min(_WINDOW, len(values))
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    left.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=_TUNED, label=f"mean of {window} steps")
    left.set(xlabel="step", ylabel=f"{curve} of the batch", title="training")
    left.legend(frameon=False)
    figures = [mean_error(report.before[aim.measure]), mean_error(report.after[aim.measure])]
    for x, (color, (mean, error)) in enumerate(zip((_BASE, _TUNED), figures)):
        right.bar(x, mean, 0.6, yerr=error, color=color, capsize=4)
        right.text(x, max(mean, 0) + error, f"{mean:.3f}", ha="center", va="bottom", fontsize=9)
    right.set_xticks((0, 1), ("base", "adapter"))
    right.set(title="held-out, ± standard error", ylabel=aim.measure)
    right.margins(y=0.15)
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 2]} …"
