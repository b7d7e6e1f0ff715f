"""A score over two hyperparameters: a table and a heat map."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich import box
from rich.table import Table


def grid_table(scores: np.ndarray, rows: Sequence[str], columns: Sequence[str], corner: str) -> Table:
    """Returns a table of `scores` in percent. The best score is bold; NaN is a dash."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(corner)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in zip(rows, scores):
        cells = ["–" if np.isnan(value) else f"{100 * value:.1f}" for value in values]
        best = [f"[bold]{cell}[/]" if value == np.nanmax(scores) else cell for cell, value in zip(cells, values)]
        table.add_row(name, *best)
    return table


def draw_grid(
    path: Path,
    scores: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    labels: tuple[str, str],
    chosen: tuple[int, int],
    title: str,
) -> None:
    """Writes a PNG heat map of scores in percent.

    Args:
      path: The output file.
      scores: `[rows, columns]`; NaN if training diverged.
      rows: Names of the rows, from bottom to top.
      columns: Names of the columns.
      labels: The axis labels of rows and columns.
      chosen: Row and column of the cell to highlight.
      title: The title.
    """
    figure = Figure(figsize=(2.4 + 1.1 * len(columns), 2.2 + 0.75 * len(rows)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
    figure.colorbar(image, ax=axes, label="validation accuracy, %").outline.set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
