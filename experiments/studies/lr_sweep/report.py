"""The table and the figure of validation losses by learning rate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from experiments.reports.table import short
from experiments.studies.lr_sweep.curve import Curve

_COLORS = ("#9ecae9", "#4c78a8", "#1f3d66", "#54a24b", "#f58518", "#e45756")
_HEADROOM = 1.3  # the highest drawn loss, as a share of the range from the smallest loss to that before training


def loss_table(curves: Sequence[Curve]) -> Table:
    """Returns the losses by learning rate. The smallest of a curve is bold; those that are as good have a star."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("learning rate", no_wrap=True)
    for curve in curves:
        rows.add_column(curve.name, justify="right")
    for rate in sorted({rate for curve in curves for rate in curve.rates}):
        cells = [_cell(curve, curve.rates.index(rate)) if rate in curve.rates else "" for curve in curves]
        rows.add_row(short(rate), *cells)
    return rows


def _cell(curve: Curve, index: int) -> str | Text:
    loss = curve.losses[index]
    if loss is None:
        return "div."
    if index == curve.best:
        return Text(f"{loss:.3f}", style="bold")
    return f"{loss:.3f}{'*' if curve.rates[index] in curve.as_good else ''}"


def best_table(curves: Sequence[Curve]) -> Table:
    """Returns the best learning rate of each curve, its loss, and the learning rate of the published rule."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("method")
    for name in ("best rate", "as good", "rule", "loss", "accuracy, %"):
        rows.add_column(name, justify="right")
    for curve in curves:
        good, best = curve.as_good, curve.best
        accuracy = curve.accuracies[best] if curve.accuracies else None
        bound = "" if not curve.at_edge else "≤ " if best == 0 else "≥ "
        rows.add_row(
            curve.name,
            f"{bound}{short(curve.best_rate)}",
            short(good[0]) if len(good) == 1 else f"{short(good[0])}–{short(good[-1])}",
            short(curve.rule),
            f"{curve.losses[best]:.3f}",
            "–" if accuracy is None else f"{100 * accuracy:.1f}",
        )
    return rows


def draw(path: Path, groups: Sequence[Sequence[Curve]]) -> None:
    """Writes a PNG with a panel for each model: a curve for each method, and the published rule as vertical lines."""
    figure = Figure(figsize=(6.2 * len(groups), 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, curves in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        _draw_panel(axes, curves)
    figure.suptitle("Validation loss by learning rate; bars are standard errors of the difference from the best rate")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axes: Axes, curves: Sequence[Curve]) -> None:
    for color, curve in zip(_COLORS, curves):
        losses, errors = np.array(curve.losses, float), np.array(curve.errors, float)  # None is NaN
        bars = errors if errors.size else None
        axes.errorbar(curve.rates, losses, bars, color=color, marker="o", markersize=4, capsize=2, label=curve.name)
        axes.plot(curve.best_rate, losses[curve.best], color=color, marker="*", markersize=13)
    for rule in sorted({curve.rule for curve in curves}):
        names = "full" if all("full" in curve.name for curve in curves if curve.rule == rule) else "LoRA"
        axes.axvline(
            rule, color="#777777", linestyle="--" if names == "LoRA" else ":", label=f"rule, {names}: {short(rule)}"
        )
    start, smallest = curves[0].start, min(loss for curve in curves for loss in curve.losses if loss is not None)
    axes.axhline(start, color="#bbbbbb", linewidth=1, label="before training")
    reach = max(start - smallest, 1e-3)
    axes.set(
        xscale="log",
        xlabel="peak learning rate (star: best)",
        ylabel="validation loss, nats",
        title=curves[0].model,
        ylim=(smallest - 0.1 * reach, smallest + _HEADROOM * reach),
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(lambda rate, _: short(rate))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
