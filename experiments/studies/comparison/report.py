"""The table of a comparison, on the screen and on a page in Markdown."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from experiments.reports.findings import Finding
from experiments.reports.table import size
from experiments.studies.comparison.description import Study, Summary

_NOT_SHOWN = ("out", "fresh", "checkpoint_every")


def cells(summaries: Sequence[Summary], paper: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table; the first column is text, the others are numbers.

    Args:
      summaries: The results.
      paper: The heading of the paper's column; empty omits it.
    """
    several = any(len(summary.row.rates) > 1 for summary in summaries)
    header = ["method", "trained parameters", "adapter file", *(["rate"] if several else []), "test accuracy, %"]
    rows = []
    for summary in summaries:
        first = summary.results[0]
        rate = [f"{first.lr:g}" if first.lr is not None else "–"] if several else []
        row = [summary.row.name, f"{summary.parameters:,}", size(first.adapter_bytes), *rate, _score(summary)]
        rows.append([*row, summary.row.paper or "–"] if paper else row)
    return ([*header, paper] if paper else header), rows


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the screen."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        result.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        result.add_row(*row)
    return result


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown.

    Example:
      >>> print(markdown(["method", "score"], [["LoRA", "1.0"]]), end="")
      | method | score |
      | --- | ---: |
      | LoRA | 1.0 |
    """
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def command(config: Any) -> str:
    """Returns the command line of a config, with the flags that differ from the defaults.

    Example:
      >>> from experiments.configs.which_weights import Config
      >>> command(Config(seeds=2, lengths=(14, 20)))
      'python -m experiments.run which-weights --seeds 2 --lengths 14 20'
    """
    name = type(config).__module__.rpartition(".")[2].replace("_", "-")
    words = [f"python -m experiments.run {name}"]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in _NOT_SHOWN or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def page(config: Any, study: Study, minutes: float, rendered: str, findings: Sequence[Finding], machine: str) -> str:
    """Returns the page of a study's results in Markdown.

    Args:
      config: Its config.
      study: Its description.
      minutes: The time of all runs, in minutes.
      rendered: The table in Markdown.
      findings: What was and was not observed.
      machine: Devices and versions.
    """
    name = type(config).__module__.rpartition(".")[2].replace("_", "-")
    verdicts = "".join(f"- **{finding.verdict}**: {finding.claim}. {finding.figures}\n" for finding in findings)
    return (
        f"# {name}\n\n{study.claim} ({study.source})\n\n"
        f"    {command(config)}\n\n"
        f"{minutes:.0f} minutes of training and evaluation, {machine}. {config.model} on {config.data}: "
        f"{config.train_examples or 'all'} training examples, {config.test_examples or 'all'} test examples; a number "
        f"after ± is the standard deviation over {config.seeds} seeds. The head is trained in every row and not "
        f"counted.\n\n{rendered}\n{verdicts}\n![{study.claim}](figure.png)\n"
    )


def _score(summary: Summary) -> str:
    if np.isnan(summary.mean):
        return "diverged"
    return f"{summary.mean:.1f} ± {summary.error:.1f}" if len(summary.results) > 1 else f"{summary.mean:.1f}"
