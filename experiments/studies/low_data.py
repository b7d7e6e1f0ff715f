"""The accuracy of methods by the number of training examples (LoRA paper, appendix F.3, table 16)."""

from collections.abc import Sequence
from functools import partial

import lora_jax as lora
from experiments.baselines.specs import QUERY_VALUE
from experiments.configs.low_data import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, better
from experiments.studies.problem import HEAD, Problem
from experiments.studies.virtual_starts import PREFIX, WithPrefix

_SIZES = (100, 1000, 10_000, 391_702)
_PAPER = {
    "prefix tuning": ("48.3", "82.5", "85.9", "89.6"),  # PreLayer
    "full fine-tuning": ("60.2", "85.8", "88.9", "89.5"),
    "LoRA": ("63.8", "85.6", "89.2", "91.7"),
}
"""MNLI with as many examples; the last are all, here without those that are held out for validation."""


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns a row for each method and number of examples."""
    adapted = {QUERY_VALUE: lora.LoRA(config.rank, alpha=config.alpha), HEAD: lora.Full()}
    methods = {
        "head alone": ({}, (), None),
        "LoRA": (adapted, config.lr, None),
        "prefix tuning": ({PREFIX: lora.Full(), HEAD: lora.Full()}, config.prefix_lr, WithPrefix(config.prefix)),
        "full fine-tuning": ({"": lora.Full()}, config.full_lr, None),
    }
    return [
        Row(
            f"{name}, {size:,} examples",
            spec,
            rates,
            series=name,
            position=size,
            paper=dict(zip(_SIZES, _PAPER.get(name, ()))).get(size, ""),
            examples=size,
            epochs=epochs,
            change=change,
        )
        for name, (spec, rates, change) in methods.items()
        for size, epochs in zip(config.sizes, config.size_epochs)
    ]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares LoRA with full fine-tuning at each size, and with prefix tuning at the smallest."""
    by_size: dict[int, dict[str, Summary]] = {}
    for summary in summaries:
        by_size.setdefault(summary.row.examples or 0, {})[summary.row.series] = summary
    equal = [
        as_good(f"with {size:,} examples, LoRA is as good as full fine-tuning", row["LoRA"], row["full fine-tuning"])
        for size, row in by_size.items()
    ]
    few = by_size[min(by_size)]
    return [
        *equal,
        better("with the fewest, LoRA is better than prefix tuning", few["LoRA"], few["prefix tuning"]),
    ]


STUDY = Study(
    claim="LoRA is as good as full fine-tuning with few and with many examples; prefix tuning needs many.",
    source="LoRA, table 16 (GPT-3 175B on MNLI with 100 to 392,702 examples)",
    paper="paper: MNLI, as many examples",
    rows=rows,
    draw=partial(figures.lines, xlabel="training examples"),
    findings=findings,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
