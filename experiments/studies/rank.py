"""The accuracy of LoRA by rank and adapted weights (LoRA paper, §7.2, tables 6 and 18)."""

from collections.abc import Sequence
from functools import partial

import lora_jax as lora
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.rank import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, paper, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, better
from experiments.studies.problem import HEAD, Problem

_TARGETS = {
    "query": "attention/query/kernel",
    "query, value": QUERY_VALUE,
    "attention": "attention/.*kernel",
    "all linear": LINEAR,
}
_PAPER = {
    "query": ("68.8 / 90.7", "69.6 / 90.9", "70.5 / 91.1", "70.4 / 90.7", "70.0 / 90.7"),
    "query, value": ("73.4 / 91.3", "73.3 / 91.4", "73.7 / 91.3", "73.8 / 91.6", "73.5 / 91.4"),
    "attention": ("74.1 / 91.2", "73.7 / 91.7", "74.0 / 91.7", "74.0 / 91.5", "73.9 / 91.4"),
}
_PAPER_RANKS = (1, 2, 4, 8, 64)
_E2E = {
    1: "68.72",
    2: "69.17",
    4: "70.38",
    8: "69.57",
    16: "69.61",
    32: "69.33",
    64: "69.24",
    128: "68.73",
    256: "68.92",
    512: "68.78",
    1024: "69.37",
}
"""BLEU of GPT-2 medium with query and value adapted (table 18)."""


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns a row for each target and rank, full rank, and full fine-tuning."""
    adapted = [_row(config, target, rank) for target in _TARGETS for rank in config.ranks]
    width = config.full_rank or problem.shape.width
    full = Row("full fine-tuning", {"": lora.Full()}, (config.full_lr,), "full fine-tuning", width)
    return [*adapted, _row(config, "all linear", width), full]


def _row(config: Config, target: str, rank: int) -> Row:
    spec = {_TARGETS[target]: lora.LoRA(rank, alpha=config.alpha), HEAD: lora.Full()}
    return Row(f"{target}, r = {rank}", spec, (config.lr,), target, rank, _results(config, target, rank))


def _results(config: Config, target: str, rank: int) -> str:
    """Returns the paper's results; those of E2E only without `--paper`, which is another task."""
    results = [paper.of_gpt3(config, dict(zip(_PAPER_RANKS, _PAPER.get(target, ()))).get(rank, ""))]
    if target == "query, value" and rank in _E2E and config.paper is None:
        results.append(f"E2E {_E2E[rank]}")
    return "; ".join(filter(None, results))


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares rank 1 with the largest rank, and full rank with full fine-tuning."""
    rows = sorted(summaries, key=lambda row: row.x)
    series = {name: [row for row in rows if row.row.series == name] for name in _TARGETS}
    smallest, largest = series["query, value"][0], series["query, value"][-1]
    return [
        as_good("for query and value, the smallest rank is as good as the largest", smallest, largest),
        better("query alone needs a larger rank than the smallest", series["query"][-1], series["query"][0]),
        as_good("LoRA of full rank is as good as full fine-tuning", series["all linear"][-1], summaries[-1]),
    ]


STUDY = Study(
    claim="A rank of 1 is enough for query and value together; query alone needs more.",
    source="LoRA, tables 6 (GPT-3 175B) and 18 (GPT-2 medium, BLEU on E2E)",
    paper="paper: WikiSQL / MNLI; E2E",
    rows=rows,
    draw=partial(figures.lines, xlabel="rank"),
    findings=findings,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
