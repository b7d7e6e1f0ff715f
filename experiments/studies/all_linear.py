"""The accuracy of QLoRA by adapted layers and rank (QLoRA paper, §4 and figure 2)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lora_jax as lora
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.all_linear import Config
from experiments.reports.findings import Finding
from experiments.studies import all_linear_paper
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, best, better
from experiments.studies.problem import HEAD, Problem

_TARGETS = {
    "query, value": QUERY_VALUE,
    "attention": "attention/.*kernel",
    "feed-forward": "feed_forward/.*kernel",
    "all linear": LINEAR,
}


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns a row for each set of layers and rank on the quantized base, and full fine-tuning in float32."""
    adapted = [
        Row(
            f"{target}, r = {rank}",
            {pattern: lora.LoRA(rank, alpha=config.alpha), HEAD: lora.Full()},
            (config.lr,),
            series=target,
            position=rank,
            rules={LINEAR: lora.NF4(double=True)},
        )
        for target, pattern in _TARGETS.items()
        for rank in config.ranks
    ]
    full = Row("full fine-tuning, float32", {"": lora.Full()}, (config.full_lr,), "full fine-tuning", max(config.ranks))
    return [*adapted, full]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares all linear layers with fewer, the ranks, and QLoRA with full fine-tuning."""
    series = {name: [row for row in summaries if row.row.series == name] for name in _TARGETS}
    selected = {name: best(group) for name, group in series.items()}
    every, full = sorted(series["all linear"], key=lambda row: row.x), summaries[-1]
    return [
        better("all linear layers are better than query and value", selected["all linear"], selected["query, value"]),
        as_good("QLoRA on all linear layers is as good as full fine-tuning", selected["all linear"], full),
        as_good("on all linear layers, the smallest rank is as good as the largest", every[0], every[-1]),
    ]


STUDY = Study(
    claim="LoRA on all linear layers of a quantized base matches full fine-tuning, whatever the rank.",
    source="QLoRA, figure 2 (LLaMA 7B on Alpaca)",
    rows=rows,
    draw=partial(figures.lines, xlabel="rank"),
    findings=findings,
)


def run(config: Config) -> list[Any]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`, or with the paper's task
    :func:`experiments.studies.all_linear_paper.run`."""
    return all_linear_paper.run(config) if config.paper else program.run(config, STUDY)
