"""Runs supervised fine-tuning and scores its answers; several methods are compared in one table."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.configs.decoder import OF_ADAPTER
from experiments.configs.sft import DEFAULTS, METHODS, Config
from experiments.evaluation.scores import Scores, cells
from experiments.input import sources
from experiments.reports.results import write_json
from experiments.studies.sft import evaluation, study
from experiments.studies.sft.held_out import find_held_out
from experiments.studies.sft.report import BEST, Report
from experiments.training import outputs, processes

COMPARISON = "comparison.json"


@dataclass(frozen=True)
class Trained:
    """The result of one method.

    Attributes:
      name: The name of the method.
      trained_parameters: Number of trained scalars.
      seconds: Time of training, including compilation and evaluation.
      validation_loss: The smallest mean validation loss per token; None without validation examples.
      scores: Scores of answers, of the base and of the adapter.
    """

    name: str
    trained_parameters: int
    seconds: float
    validation_loss: float | None
    scores: list[Scores]


def run(config: Config) -> list[Trained]:
    """Runs or resumes the study, for each method in a directory of its own, and prints scores of answers.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run` and :func:`evaluation.run`.
    """
    console = processes.console()
    if not config.methods:
        return [_run(config, "", console, with_base=True)]
    if processes.is_first():
        outputs.claim(config.out, COMPARISON, *config.methods)
    results, quantizations = [], set()
    for name in config.methods:
        method, quantize = METHODS[name]
        console.rule(name)
        fields: dict[str, Any] = {"methods": (), "method": method, "quantize": quantize, "out": config.out / name}
        if method == "full":  # has no ranks, targets and so on
            fields = {setting: getattr(DEFAULTS, setting) for setting in OF_ADAPTER} | fields
        one = dataclasses.replace(config, **fields)
        results.append(_run(one, name, console, with_base=quantize not in quantizations))
        quantizations.add(quantize)
    if processes.is_first():
        console.rule()
        console.print(table(results))
        write_json(config.out / COMPARISON, list(map(asdict, results)))
        console.print(f"written to {config.out / COMPARISON}", highlight=False, soft_wrap=True)
    return results


def _run(config: Config, name: str, console: Console, *, with_base: bool) -> Trained:
    report: Report = study.run(config)
    scores: list[Scores] = []
    if config.test_examples != 0:
        held_out = find_held_out(config)
        if held_out is None:
            console.print(
                f"no scores of answers: {sources.unweighted(config.data)} has no test or validation examples; "
                "--validation-share holds some out",
                highlight=False,
                soft_wrap=True,
            )
        else:
            scores = evaluation.run(config, held_out, config.out / BEST, with_base=with_base)
    loss = dict(report.evaluations).get(report.best_step)
    return Trained(name, report.trained_parameters, report.seconds, loss, scores)


def table(results: Sequence[Trained]) -> Table:
    """Returns costs and scores: a line for each base and for each method."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("method")
    for name in ("trained\nparameters", "seconds", "validation\nloss", "perplexity", "ROUGE-L", "BLEU"):
        rows.add_column(name, justify="right", no_wrap=True)
    for result in results:
        _, quantize = METHODS[result.name]
        for row in result.scores:
            if row.name in (evaluation.BASE, evaluation.BASE_SHOTS):
                rows.add_row(row.name if quantize == "none" else f"{row.name} ({quantize})", "–", "–", "–", *cells(row))
    for result in results:
        loss = "–" if result.validation_loss is None else f"{result.validation_loss:.3f}"
        tuned = next((cells(row) for row in result.scores if row.name == evaluation.TUNED), ("–",) * 3)
        rows.add_row(result.name, f"{result.trained_parameters:,}", f"{result.seconds:.0f}", loss, *tuned)
    return rows
