"""The plots of the analysis."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from lora_jax.analysis import Amplification, Drift

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
_MARKERS = {"query": "o", "value": "^"}


def similarities(path: Path, grids_of: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Plots φ for all i and j: a row for each weight, a column for each comparison."""
    names = list(next(iter(grids_of.values())))
    figure, panels = _panels(len(grids_of), len(names), (3.1, 3.0))
    image = None
    for row, (weight, grids) in zip(panels, grids_of.items()):
        for axes, name in zip(row, names):
            grid = grids[name]
            extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
            image = axes.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="magma", extent=extent, interpolation="none")
            axes.set_title(name, fontsize=9)
            axes.set(xlabel="j", xticks=_ticks(grid.shape[1]), yticks=_ticks(grid.shape[0]))
        row[0].set_ylabel(f"{_short(weight)}\ni")
    assert image is not None
    figure.colorbar(image, ax=panels, label="φ(i, j)", shrink=0.8)
    _save(figure, path, "Overlap of the subspaces of the first i and the first j directions")


def amplifications(path: Path, by_method: Mapping[str, Mapping[str, Amplification]]) -> None:
    """Plots the amplification of every weight, and the norm of W projected on the directions of ΔW and on others."""
    figure, ((left, right),) = _panels(1, 2, (5.6, 4.2))
    for color, weights in zip(_COLORS, by_method.values()):
        for part, selected in _by_part(weights).items():
            layers = range(len(selected))
            values = [float(amplification.factor) for amplification in selected]
            left.plot(layers, values, color=color, marker=_MARKERS[part], markersize=5, linewidth=1)
    method, weights = next(iter(by_method.items()))
    kinds = {f"ΔW of {method}": "projected", "W, the largest": "largest", "random": "random"}
    for color, field in zip(_COLORS, kinds.values()):
        for part, selected in _by_part(weights).items():
            values = [float(getattr(amplification, field)) for amplification in selected]
            right.plot(range(len(selected)), values, color=color, marker=_MARKERS[part], markersize=5, linewidth=1)
    left.set(xlabel="layer", ylabel="‖ΔW‖ / ‖UᵀWVᵀ‖", yscale="log", title="amplification")
    right.set(xlabel="layer", ylabel="‖UᵀWVᵀ‖", yscale="log", title="norm of W in as many directions of …")
    for axes in (left, right):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(left, list(by_method))
    _legend(right, list(kinds))
    _save(figure, path, "Amplification of W by ΔW in the directions of ΔW")


def drifts(
    path: Path,
    by_method: Mapping[str, Mapping[int, Mapping[str, Drift]]],
    correlations: Mapping[str, Mapping[str, float]],
) -> None:
    """Plots ΔM over ΔD: a panel for each method, a point for each weight and step."""
    figure, (row,) = _panels(1, len(by_method), (3.4, 3.6))
    for axes, (method, steps) in zip(row, by_method.items()):
        for color, weights in zip(_COLORS, steps.values()):
            for weight, drift in weights.items():
                axes.scatter(drift.direction, drift.magnitude, color=color, marker=_MARKERS[_part(weight)], s=22)
        values = ", ".join(f"{part} {value:+.2f}" for part, value in correlations[method].items())
        axes.set(xlabel="ΔD, change of direction")
        axes.set_title(f"{method}\ncorrelation: {values}", fontsize=10, pad=16)
        axes.ticklabel_format(scilimits=(-2, 3))
    row[0].set_ylabel("ΔM, change of magnitude")
    steps = next(iter(by_method.values()))
    _legend(row[-1], [f"step {step}" for step in steps])
    _save(figure, path, "Changes of the query and value weights")


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(columns * size[0], rows * size[1]), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Draws a legend of colors by name and markers by part of the attention."""
    entries = [Line2D([], [], color=color, label=name) for color, name in zip(_COLORS, names)]
    entries += [
        Line2D([], [], color="grey", marker=marker, linestyle="", label=part) for part, marker in _MARKERS.items()
    ]
    axes.legend(handles=entries, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _save(figure: Figure, path: Path, title: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _ticks(size: int) -> list[int]:
    return sorted({1, *np.linspace(0, size, 5).round().astype(int)[1:].tolist()})


def _by_part(weights: Mapping[str, Amplification]) -> dict[str, list[Amplification]]:
    """Groups the weights of query and value, each in the order of the layers."""
    return {
        part: [amplification for path, amplification in weights.items() if _part(path) == part] for part in _MARKERS
    }


def _part(path: str) -> str:
    return next(part for part in _MARKERS if f"/{part}/" in path)


def _short(path: str) -> str:
    layer = re.search(r"\d+", path)
    return f"{_part(path)} of layer {layer.group()}" if layer else _part(path)
