"""The subspaces that LoRA learns and their amplification (LoRA paper, §7.2, §7.3, appendix G and H)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import lora_jax as lora
from experiments.baselines.specs import QUERY_VALUE
from experiments.configs.subspaces import Config
from experiments.errors import UserError
from experiments.reports.findings import Finding, Verdict
from experiments.reports.page import Grid
from experiments.studies import subspace_figures
from experiments.studies.comparison import program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.problem import HEAD, Problem
from lora_jax import analysis

_PAPER = {"small": "0.32 / 21.67 / 0.02; 6.91; 21.6", "large": "1.90 / 37.71 / 0.33; 3.57; 1.9"}
"""r = 4 and r = 64, query of layer 48 of 96."""


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns LoRA of both ranks.

    Raises:
      UserError: The model has no such layer.
    """
    if config.layer is not None and config.layer >= problem.shape.layers:
        raise UserError(f"--layer {config.layer}: expected a layer from 0 to {problem.shape.layers - 1}")
    return [
        Row(f"LoRA, r = {rank}", _spec(rank, config.alpha), (config.lr,), series=size)
        for size, rank in (("small", config.rank), ("large", config.large_rank))
    ]


def _spec(rank: int, alpha: float) -> dict:
    return {QUERY_VALUE: lora.LoRA(rank, alpha=alpha), HEAD: lora.Full()}


def overlaps(summaries: Sequence[Summary]) -> dict[str, dict[str, np.ndarray]]:
    """Returns φ for all i and j by path and by what is compared; of input directions unless stated otherwise."""
    small, large = summaries
    adapters = [small.adapter(), large.adapter(), large.adapter(1)]
    changes = [analysis.decompose({path: node for path, node in delta.items() if _adapted(path)}) for delta in adapters]
    weights = analysis.decompose_weights(small.start.base, {path: adapters[1][path] for path in changes[1]})
    rng, result = np.random.default_rng(0), {}
    for path in changes[0]:
        one, two, three = (change[path] for change in changes)
        count = two.values.shape[-1]
        random = [np.linalg.qr(rng.normal(size=two.inputs.shape))[0] for _ in range(2)]
        pairs = {
            "both ranks, inputs": (one.inputs, three.inputs),
            "both ranks, outputs": (one.outputs, three.outputs),
            "two seeds, inputs": (two.inputs, three.inputs),
            "two seeds, outputs": (two.outputs, three.outputs),
            "random": random,
            "W and ΔW": (weights[path].inputs[..., :count], two.inputs),
        }
        result[path] = {name: analysis.similarity(*pair) for name, pair in pairs.items()}
    return result


def _adapted(path: str) -> bool:
    return re.search(QUERY_VALUE, path) is not None


def amplifications(summary: Summary) -> dict[str, analysis.Amplification]:
    """Returns the amplification of every adapted weight."""
    delta = {path: node for path, node in summary.adapter().items() if _adapted(path)}
    return analysis.amplification(delta, summary.start.base)


def grid(summaries: Sequence[Summary]) -> Grid:
    """Returns the medians of table 7's quantities over all adapted weights."""
    header = ["", "‖UᵀWVᵀ‖ of ΔW", "of W", "random", "‖ΔW‖", "amplification", "paper, r = 4 and 64"]
    rows = []
    for summary in summaries:
        values = list(amplifications(summary).values())
        numbers = np.array([[x.projected, x.largest, x.random, x.change, x.factor] for x in values], float)
        rows.append(
            [summary.row.name, *(f"{number:.2f}" for number in np.median(numbers, 0)), _PAPER[summary.row.series]]
        )
    return Grid(header, rows)


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares the overlaps with those of random directions, and the amplifications with the paper's."""
    by_name = _medians(overlaps(summaries))
    small, large = (_median(float(x.factor) for x in amplifications(summary).values()) for summary in summaries)
    values = amplifications(summaries[0]).values()
    ratio, below = _median(x.projected / x.random for x in values), _median(x.projected / x.largest for x in values)
    shared, chance = by_name["two seeds, inputs"], by_name["random"]
    return [
        _observed(
            "the first direction of one seed is in the space of the other, and the other directions are not",
            shared[0] > 0.5 and shared[1] < 2 * chance[1],
            f"φ(1, r) {shared[0]:.2f} (random {chance[0]:.2f}), φ(r, r) {shared[1]:.2f} (random {chance[1]:.2f}), "
            "medians over weights",
        ),
        _observed(
            "a small rank amplifies its directions more than a large one",
            small > large,
            f"{small:.1f} and {large:.1f}; the paper 21.6 and 1.9",
        ),
        _observed(
            "ΔW follows directions of W that are neither its largest ones nor random",
            ratio > 2 and below < 0.5,
            f"W has {ratio:.1f} × the norm of random directions there, and {below:.2f} × that of its largest ones; the "
            "paper 16 × and 0.015 ×",
        ),
    ]


def _medians(overlaps_of: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Returns the medians over weights of φ(1, all) and φ(all, all)."""
    every = list(overlaps_of.values())
    return {
        name: (_median(grids[name][0, -1] for grids in every), _median(grids[name][-1, -1] for grids in every))
        for name in every[0]
    }


def _median(values: Iterable[Any]) -> float:
    return float(np.median(list(values)))


def _observed(claim: str, holds: bool, figures: str) -> Finding:
    verdict: Verdict = "observed" if holds else "not observed"
    return Finding(claim, verdict, figures)


def entries(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Returns φ(1, all), φ(all, all) and amplifications of all layers for the record."""
    return {
        "overlaps": {
            path: {name: {"first": float(x[0, -1]), "all": float(x[-1, -1])} for name, x in grids.items()}
            for path, grids in overlaps(summaries).items()
        },
        "amplifications": {
            row.row.name: {
                path: {name: float(value) for name, value in vars(x).items()} for path, x in amplifications(row).items()
            }
            for row in summaries
        },
    }


STUDY = Study(
    claim="LoRA learns few directions: runs share the first one only, and W does not emphasize them",
    source="LoRA, figures 3 and 4, table 7 (GPT-3 175B)",
    rows=rows,
    draw=lambda figure, summaries: _draw(figure, summaries, None),
    findings=findings,
    grid=grid,
    entries=entries,
    size=(12.0, 9.5),
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, replace(STUDY, draw=partial(_draw, layer=config.layer)))


def _draw(figure: Figure, summaries: Sequence[Summary], layer: int | None) -> None:
    by_path = overlaps(summaries)
    layer = summaries[0].start.problem.shape.layers // 2 if layer is None else layer
    drawn = {path: grids for path, grids in by_path.items() if re.search(rf"\b{layer}\b", path)}
    subspace_figures.draw(figure, drawn, {row.row.name: amplifications(row) for row in summaries})
