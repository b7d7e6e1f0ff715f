"""A score over two hyperparameters as a heat map."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_grid(
    figure: Figure,
    scores: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    labels: tuple[str, str],
    score: str,
    chosen: tuple[int, int],
) -> None:
    """Draws a heat map of scores in percent.

    Args:
      figure: The figure.
      scores: `[rows, columns]`; NaN if training diverged.
      rows: Names of the rows, from bottom to top.
      columns: Names of the columns.
      labels: The axis labels of rows and columns.
      score: The name of the score.
      chosen: Row and column of the cell to highlight.
    """
    axes = figure.subplots()
    percent = 100 * scores
    image = axes.imshow(percent, cmap="viridis", origin="lower", aspect="auto")
    axes.set_facecolor("#dddddd")  # the color of NaN
    middle = (np.nanmin(percent) + np.nanmax(percent)) / 2
    for row, column in np.ndindex(*percent.shape):
        value = percent[row, column]
        text, color = ("diverged", "black") if np.isnan(value) else (f"{value:.1f}", "white")
        if not np.isnan(value) and value > middle:
            color = "black"
        axes.text(column, row, text, ha="center", va="center", color=color)
    row, column = chosen
    axes.add_patch(
        Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#e45756", linewidth=3, clip_on=False)
    )
    axes.set(xlabel=labels[1], ylabel=labels[0])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=f"{score}, %").outline.set_visible(False)
