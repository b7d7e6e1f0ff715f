"""DoRA's accuracy by rank, its parts, and its changes of magnitude and direction (DoRA paper, §3.2, §4.3 and §5)."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

import lora_jax as lora
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.dora import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good
from experiments.studies.problem import HEAD, Problem
from lora_jax import analysis

_GRADIENT = "DoRA, gradient through the norm"
_QKV = "attention/(query|key|value)/kernel"
_PAPER = {4: ("39.5", "61.9"), 8: ("40.7", "77.9"), 16: ("70.9", "77.5")}
"""LoRA and DoRA by rank: LLaMA 7B, mean of eight commonsense tasks."""
_CORRELATIONS = {"full": -0.62, "DoRA": -0.31, "LoRA": 0.83}


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns LoRA and DoRA by rank, DoRA's parts at one rank, both on an NF4 base, and full fine-tuning."""
    rates, middle, alpha = (config.lr,), config.rank, config.alpha

    def row(name: str, recipe: lora.Recipe, series: str, position: float, **fields) -> Row:
        spec = fields.pop("spec", {LINEAR: recipe}) | {HEAD: lora.Full()}
        return Row(name, spec, fields.pop("rates", rates), series, position, **fields)

    by_rank = [
        row(
            f"{name}, r = {rank}",
            recipe(rank, alpha),
            name,
            rank,
            paper=_PAPER.get(rank, ("", ""))[index],
            tracked=QUERY_VALUE if rank == middle else "",
        )
        for index, (name, recipe) in enumerate({"LoRA": lora.LoRA, "DoRA": lora.DoRA}.items())
        for rank in config.ranks
    ]
    dora, nf4 = lora.DoRA(middle, alpha), {LINEAR: lora.NF4()}
    parts = [
        row(
            "DoRA, gradient through the norm",
            lora.DoRA(middle, alpha, norm_gradient=True),
            "norm",
            middle,
            paper="78.3",
        ),
        row(
            "DoRA on q, k, v; magnitudes of all",
            dora,
            "q, k, v",
            middle,
            spec={_QKV: dora, LINEAR: lora.IA3()},
            paper="77.5 (r = 32)",
        ),
        row("QLoRA", lora.LoRA(middle, alpha), "QLoRA", middle, rules=nf4),
        row("QDoRA", dora, "QDoRA", middle, rules=nf4),
        row(
            "weight normalization",
            lora.DoRA(config.full_rank or problem.shape.width, alpha, norm_gradient=True),
            "weight normalization",
            max(config.ranks),
        ),
        Row(
            "full fine-tuning",
            {"": lora.Full()},
            (config.full_lr,),
            "full fine-tuning",
            max(config.ranks),
            tracked=QUERY_VALUE,
        ),
    ]
    return [*by_rank, *parts]


def correlations(summaries: Sequence[Summary]) -> dict[str, tuple[float, list[analysis.Drift]]]:
    """Returns the correlation of ΔM and ΔD over weights and epochs for LoRA, DoRA and full fine-tuning, and both."""
    tracked = {summary.row.series.split()[0]: summary for summary in summaries if summary.row.tracked}
    axes = {path: node.axes for path, node in next(iter(tracked["LoRA"].snapshots().values())).items()}
    drifts = {}
    for name, summary in tracked.items():
        steps = summary.snapshots().values()
        points = [analysis.drift(delta, summary.start.base, axes=axes) for delta in steps]
        drifts[name] = [drift for step in points for drift in step.values()]
    return {name: (analysis.correlation(points), points) for name, points in drifts.items()}


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares DoRA with LoRA at each rank, its parts, and the signs of the correlations."""
    by_name = {summary.row.name: summary for summary in summaries}
    pairs = {
        summary.row.name: by_name[summary.row.name.replace("LoRA", "DoRA")]
        for summary in summaries
        if summary.row.series == "LoRA"
    }
    middle = next(summary for summary in summaries if summary.row.series == "DoRA" and summary.row.tracked)
    signs = {name: value for name, (value, _) in correlations(summaries).items()}
    agree = all((value > 0) == (signs[name] > 0) for name, value in _CORRELATIONS.items())
    gradient, quantized = by_name[_GRADIENT], by_name["QDoRA"]
    return [
        *(as_good(f"DoRA is as good as {name}, or better", dora, by_name[name]) for name, dora in pairs.items()),
        as_good("without a gradient through the norm, DoRA loses nothing", middle, gradient),
        as_good("QDoRA is as good as QLoRA, or better", quantized, by_name["QLoRA"]),
        as_good("DoRA is as good as full fine-tuning", middle, by_name["full fine-tuning"]),
        Finding(
            "ΔM and ΔD have the signs of correlation of the paper",
            "observed" if agree else "not observed",
            "; ".join(f"{name} {signs[name]:+.2f} (paper {value:+.2f})" for name, value in _CORRELATIONS.items()),
        ),
    ]


def entries(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Returns the correlations, and ΔM and ΔD of every weight and epoch, for the record."""
    return {
        "correlations": {
            name: {
                "value": value,
                "magnitude": [float(point.magnitude) for point in points],
                "direction": [float(point.direction) for point in points],
            }
            for name, (value, points) in correlations(summaries).items()
        }
    }


def draw(figure: Figure, summaries: Sequence[Summary]) -> None:
    """Draws the accuracies by rank, and ΔM over ΔD of LoRA, DoRA and full fine-tuning."""
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2))[:, 0]
    figures.lines(upper, summaries, xlabel="rank")
    drifts: Mapping[str, tuple[float, list[analysis.Drift]]] = correlations(summaries)
    for axes, (name, (value, points)) in zip(lower.subplots(1, len(drifts)), drifts.items()):
        axes.scatter([point.direction for point in points], [point.magnitude for point in points], s=14)
        axes.set_title(f"{name}: correlation {value:+.2f}", fontsize=10)
        axes.set(xlabel="ΔD, change of direction", ylabel="ΔM, change of magnitude")
        axes.ticklabel_format(scilimits=(-2, 3))
        axes.spines[["top", "right"]].set_visible(False)


STUDY = Study(
    claim="DoRA is at least as good as LoRA at every rank, and changes weights as full fine-tuning does",
    source="DoRA, tables 1, 6 and 7, figures 2 and 3 (LLaMA 7B, commonsense reasoning; VL-BART)",
    paper="paper: commonsense",
    rows=rows,
    draw=draw,
    findings=findings,
    entries=entries,
    size=(8.5, 8.0),
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
