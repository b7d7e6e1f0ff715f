"""The figure of subspaces: overlaps of directions as heat maps, amplifications by layer."""

import re
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from lora_jax.analysis import Amplification

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
_MARKERS = {"query": "o", "value": "^"}


def draw(
    figure: Figure,
    overlaps: Mapping[str, Mapping[str, np.ndarray]],
    amplifications: Mapping[str, Mapping[str, Amplification]],
) -> None:
    """Draws φ(i, j), a row for each weight and a column for each comparison, above the amplification by layer.

    Args:
      figure: The figure.
      overlaps: φ by path and comparison.
      amplifications: Amplifications by run and path.
    """
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(len(overlaps), 1.2))[:, 0]
    names = list(next(iter(overlaps.values())))
    panels = upper.subplots(len(overlaps), len(names), squeeze=False)
    image = None
    for row, (path, grids) in zip(panels, overlaps.items()):
        for axes, name in zip(row, names):
            rows, columns = grids[name].shape
            extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
            image = axes.imshow(
                grids[name], vmin=0, vmax=1, aspect="auto", cmap="magma", extent=extent, interpolation="none"
            )
            axes.set_title(name, fontsize=9)
            axes.set(xlabel="j", xticks=_ticks(columns), yticks=_ticks(rows))
        row[0].set_ylabel(f"{_part(path)} of layer {_layer(path)}\ni")
    assert image is not None
    upper.colorbar(image, ax=panels, label="φ(i, j)", shrink=0.8)
    _draw_amplifications(lower, amplifications)


def _draw_amplifications(figure: Figure, by_run: Mapping[str, Mapping[str, Amplification]]) -> None:
    """Draws the amplification of each run, and the norms of W in the directions of the first one's ΔW and of others."""
    left, right = figure.subplots(1, 2)
    for color, (run, weights) in zip(_COLORS, by_run.items()):
        for part in _MARKERS:
            _line(left, color, part, f"{run}, {part}", weights, "factor")
    first = next(iter(by_run))
    for color, (name, field) in zip(
        _COLORS, {f"ΔW of {first}": "projected", "W, the largest": "largest", "random": "random"}.items()
    ):
        for part in _MARKERS:
            _line(right, color, part, f"{name}, {part}", by_run[first], field)
    left.set(xlabel="layer", ylabel="‖ΔW‖ / ‖UᵀWVᵀ‖", yscale="log", title="amplification")
    right.set(xlabel="layer", ylabel="‖UᵀWVᵀ‖", yscale="log", title="norm of W in as many directions of …")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _line(axes, color: str, part: str, label: str, weights: Mapping[str, Amplification], field: str) -> None:
    values = [float(getattr(weights[path], field)) for path in weights if _part(path) == part]
    axes.plot(range(len(values)), values, color=color, marker=_MARKERS[part], markersize=5, linewidth=1, label=label)


def _ticks(size: int) -> list[int]:
    return sorted({1, *np.linspace(0, size, 4).round().astype(int)[1:].tolist()})


def _part(path: str) -> str:
    return next(part for part in _MARKERS if f"/{part}/" in path)


def _layer(path: str) -> str:
    match = re.search(r"\d+", path)
    return match.group() if match else ""
