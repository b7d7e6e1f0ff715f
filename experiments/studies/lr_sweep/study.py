"""Measures validation losses by learning rate, and compares them with the findings of LoRA Without Regret."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from experiments.configs.lr_sweep import Config
from experiments.models import location
from experiments.reports.findings import Finding, show
from experiments.reports.results import write_json
from experiments.studies import provenance
from experiments.studies.lr_sweep import decoder, encoder, findings
from experiments.studies.lr_sweep.curve import Curve
from experiments.studies.lr_sweep.report import best_table, draw, loss_table
from experiments.training import outputs, processes

_FIGURE, _RECORD = "lr-sweep.png", "run.json"


@outputs.exclusive
def run(config: Config) -> list[Curve]:
    """Measures or resumes the curves of the config, prints tables and findings, and writes a JSON record and a figure.

    Raises:
      UserError: A model or data are missing or malformed, or all runs of a curve diverged.
    """
    outputs.claim(config.out, _RECORD, _FIGURE)
    console = processes.console()
    if config.decoder is not None:
        location.find(config.decoder)  # so that a missing one is reported first
    groups = [list(encoder.curves(config, console))]
    if config.decoder is not None:
        groups.append([decoder.curve(config.decoder, config, console)])
    observed = [*compare(config, groups[0]), *(findings.compare_rule(curve) for (curve,) in groups[1:])]
    _show(config, groups, observed, console)
    return [curve for group in groups for curve in group]


def compare(config: Config, curves: Sequence[Curve]) -> list[Finding]:
    """Compares the curves of the encoder with the published findings."""
    by_name = {curve.name: curve for curve in curves}
    adapted = [by_name[encoder.LORA.format(rank)] for rank in config.ranks]
    full = by_name[encoder.FULL]
    results = [findings.compare_ratio(adapted, full)]
    if len(adapted) > 1:
        results.append(findings.compare_ranks(adapted))
    results.append(findings.compare_quality(adapted, full))
    middle = by_name[encoder.LORA.format(config.middle_rank)]
    if config.attention:
        attention = by_name[encoder.ATTENTION.format(config.attention_rank)]
        results.append(findings.compare_targets(attention, middle))
    return [*results, findings.compare_rule(middle), findings.compare_rule(full)]


def _show(config: Config, groups: Sequence[Sequence[Curve]], observed: Sequence[Finding], console: Console) -> None:
    for curves in groups:
        before = f"{curves[0].start:.3f} before training; *: as good as the best"
        console.print(f"\n{curves[0].model}: validation loss by learning rate ({before})", highlight=False)
        console.print(loss_table(curves))
        console.print(best_table(curves))
    show(observed, console)
    draw(config.out / _FIGURE, groups)
    write_json(
        config.out / _RECORD,
        provenance.record(
            config,
            curves=[_as_json(curve) for curves in groups for curve in curves],
            findings=[asdict(finding) for finding in observed],
        ),
    )
    console.print(f"written to {config.out}: {_RECORD}, {_FIGURE} and a directory for each run", highlight=False)


def _as_json(curve: Curve) -> dict:
    summary = {"best_rate": curve.best_rate, "at_edge": curve.at_edge, "as_good": curve.as_good}
    return {name: value for name, value in asdict(curve).items() if name != "examples"} | summary
