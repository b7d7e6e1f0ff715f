"""Plots of losses over training steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#72b7b2", "#9d755d", "#eeca3b", "#1f3d66")
"""The colors of lines, in their order."""

_WINDOW = 25  # steps over which the loss is smoothed


def draw_losses(path: Path, losses: Sequence[float], evaluations: Sequence[tuple[int, float]], title: str) -> None:
    """Writes a PNG of a run's loss per token: training steps and evaluations on validation data."""
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    plot_losses(axes, COLORS[0], "training", [np.array(losses)])
    if evaluations:
        steps, values = zip(*evaluations)
        axes.plot(steps, values, color=COLORS[1], marker="o", markersize=6, linestyle="", label="validation")
    axes.set(xlabel="step", ylabel="loss per token, nats")
    finish(axes)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def finish(axes: Axes) -> None:
    """Draws the grid and the legend."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def plot_losses(axes: Axes, color: str, label: str, losses: Sequence[np.ndarray]) -> None:
    """Draws the losses of runs of one method by step, and their smoothed mean on top."""
    mean = np.mean(losses, axis=0)
    window = min(_WINDOW, len(mean))
    smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
    for loss in losses:
        axes.plot(np.arange(1, len(loss) + 1), loss, color=color, alpha=0.2, linewidth=0.6)
    axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=color, label=label)
