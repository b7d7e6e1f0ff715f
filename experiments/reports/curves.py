"""Plots of losses and accuracies over training steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.reports.results import Result
from experiments.reports.table import by_method

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
_WINDOW = 25  # steps over which the loss is smoothed


def draw(path: Path, results: Sequence[Result], title: str) -> None:
    """Writes a PNG with training loss on the left and validation accuracy on the right.

    Each method has a color; the mean over its seeds is drawn on top. A method without training steps (a fitted head) is
    a horizontal line.
    """
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for color, (method, runs) in zip(_COLORS, by_method(results).items()):
        test = 100 * np.mean([run.test_accuracy for run in runs])
        label = f"{method} (test {test:.1f} %)"
        if not runs[0].losses:
            right.axhline(100 * runs[0].validation_accuracy, color=color, linestyle="--", label=label)
            continue
        _losses(left, color, method, [np.array(run.losses) for run in runs])
        _accuracies(right, color, label, runs)
    left.set(xlabel="step", ylabel="training loss", title="loss")
    right.set(xlabel="step", ylabel="validation accuracy, %", title="accuracy")
    _finish(path, figure, (left, right), title)


def draw_losses(path: Path, losses: Sequence[float], evaluations: Sequence[tuple[int, float]], title: str) -> None:
    """Writes a PNG of a run's loss per token: training steps and evaluations on validation data."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _losses(axes, _COLORS[0], "training", [np.array(losses)])
    if evaluations:
        steps, values = zip(*evaluations)
        axes.plot(steps, values, color=_COLORS[1], marker="o", markersize=6, linestyle="", label="validation")
    axes.set(xlabel="step", ylabel="loss per token, nats")
    _finish(path, figure, (axes,), title)


def _finish(path: Path, figure: Figure, panels: Sequence[Axes], title: str) -> None:
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _losses(axes: Axes, color: str, label: str, losses: list[np.ndarray]) -> None:
    mean = np.mean(losses, axis=0)
    window = min(_WINDOW, len(mean))
    smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
    for loss in losses:
        axes.plot(np.arange(1, len(loss) + 1), loss, color=color, alpha=0.2, linewidth=0.6)
    axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=color, label=label)


def _accuracies(axes: Axes, color: str, label: str, runs: Sequence[Result]) -> None:
    steps = [step for step, _ in runs[0].evaluations]
    accuracies = 100 * np.array([[accuracy for _, accuracy in run.evaluations] for run in runs])
    if len(runs) > 1:
        axes.plot(steps, accuracies.T, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, accuracies.mean(axis=0), color=color, marker="o", markersize=4, label=label)
