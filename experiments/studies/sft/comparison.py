"""Runs supervised fine-tuning and scores its answers; several methods are compared in one table."""

import dataclasses
from dataclasses import asdict
from typing import Any

from rich.console import Console

from experiments.configs.decoder import OF_ADAPTER
from experiments.configs.sft import DEFAULTS, METHODS, Config
from experiments.evaluation.scores import Scores
from experiments.input import sources
from experiments.reports.page import FILES
from experiments.reports.results import write_json
from experiments.studies import provenance
from experiments.studies.sft import evaluation, study
from experiments.studies.sft.held_out import find_held_out
from experiments.studies.sft.page import Trained, page
from experiments.studies.sft.report import BEST, Report
from experiments.training import outputs, processes

COMPARISON = "comparison.json"


def run(config: Config) -> list[Trained]:
    """Runs or resumes the study, for each method in a directory of its own, and prints scores of answers.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run` and :func:`evaluation.run`.
    """
    console = processes.console()
    if not config.methods:
        results = [_run(config, _name(config), console, with_base=True, with_table=False)]  # the page has them
        if processes.is_first() and results[0].scores:
            _publish(config, results, console)
        return results
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
        results.append(_run(one, name, console, with_base=quantize not in quantizations, with_table=True))
        quantizations.add(quantize)
    if processes.is_first():
        console.rule()
        write_json(config.out / COMPARISON, list(map(asdict, results)))
        _publish(config, results, console)
    return results


def _publish(config: Config, results: list[Trained], console: Console) -> None:
    outputs.claim(config.out, *FILES)
    page(config, results).publish(config, provenance.record(config), console)


def _run(config: Config, name: str, console: Console, *, with_base: bool, with_table: bool) -> Trained:
    held_out = (
        find_held_out(config) if config.test_examples != 0 else None
    )  # before training, in case files are missing
    report: Report = study.run(config)
    scores: list[Scores] = []
    if config.test_examples != 0:
        if held_out is None:
            console.print(
                f"no scores of answers: {sources.unweighted(config.data)} has no test or validation examples; "
                "--validation-share holds some out",
                highlight=False,
                soft_wrap=True,
            )
        else:
            scores = evaluation.run(config, held_out, config.out / BEST, with_base=with_base, with_table=with_table)
    loss = dict(report.evaluations).get(report.best_step)
    return Trained(
        name,
        config.quantize,
        report.trained_parameters,
        report.seconds,
        loss,
        scores,
        report.losses,
        report.evaluations,
    )


def _name(config: Config) -> str:
    """Returns the name of the method of a single run: that of `--methods` if it has one."""
    setting = (config.method, config.quantize)
    return next((name for name, method in METHODS.items() if method == setting), config.method)
