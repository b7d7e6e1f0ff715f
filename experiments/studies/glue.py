"""Every method that the LoRA paper compares, by trained parameters (LoRA paper, tables 2 and 15, figure 2)."""

from collections.abc import Sequence

import lora_jax as lora
from experiments.baselines import specs
from experiments.configs.glue import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, better
from experiments.studies.problem import HEAD, Problem
from experiments.studies.virtual_starts import PREFIX, PROMPT, WithPrefix, WithPrompt

_QV, _LINEAR = "attention/(query|value)/kernel", "(attention|feed_forward)/.*kernel"
_LATE, _BOTH = "feed_forward/down/kernel", "(attention/output|feed_forward/down)/kernel"
_ROBERTA, _GPT3 = "RoBERTa-base {}", "GPT-3 {}"


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns every method at its sizes."""
    head = {HEAD: lora.Full()}
    lora_rows = [
        Row(
            f"LoRA on query and value, r = {rank}",
            {_QV: lora.LoRA(rank, config.alpha)} | head,
            config.lr,
            "LoRA, query and value",
            paper=_ROBERTA.format("87.2, ") + _GPT3.format("73.8 / 91.7") if rank == 8 else "",
        )
        for rank in config.ranks
    ]
    linear = [
        Row(
            f"LoRA on all linear layers, r = {rank}",
            {_LINEAR: lora.LoRA(rank, config.alpha)} | head,
            config.lr,
            "LoRA, all linear layers",
        )
        for rank in config.linear_ranks
    ]
    bottlenecks = [
        Row(f"{name}, size {size}", {pattern: lora.Bottleneck(size, activation)} | head, config.lr, name, paper=paper)
        for name, pattern, activation, paper in (
            ("Houlsby adapters", _BOTH, "swish", _GPT3.format("73.2 / 91.5")),
            ("Pfeiffer adapters", _LATE, "relu", _ROBERTA.format("85.4 (AdapterDrop)")),
        )
        for size in config.sizes
    ]
    prefixes = [
        Row(
            f"prefix of {length}",
            {PREFIX: lora.Full()} | head,
            config.prefix_lr,
            "prefix tuning",
            paper=_GPT3.format("70.1 / 89.5 (PreLayer)"),
            change=WithPrefix(length),
        )
        for length in config.prefixes
    ]
    prompts = [
        Row(
            f"prompt of {length}",
            {PROMPT: lora.Full()} | head,
            config.prefix_lr,
            "prompt tuning",
            paper=_GPT3.format("63.1 / 88.6 (PreEmbed)"),
            change=WithPrompt(length),
        )
        for length in config.prompts
    ]
    both = Row(
        f"LoRA, r = {config.ranks[-1]}, with a prompt of {config.prompts[0]}",
        {_QV: lora.LoRA(config.ranks[-1], config.alpha), PROMPT: lora.Full()} | head,
        config.lr,
        "LoRA and prompt",
        paper=_GPT3.format("76.2 / 91.3"),
        change=WithPrompt(config.prompts[0]),
    )
    count = min(2, problem.shape.layers)
    whole = [
        Row("head alone", {}, series="head alone"),
        Row("BitFit", specs.bitfit(problem.base) | head, config.lr, "BitFit", paper=_ROBERTA.format("85.2")),
        Row(f"top {count} layers", specs.top_layers(problem.base, count) | head, config.full_lr, "top layers"),
        Row("full fine-tuning", specs.full(), config.full_lr, "full fine-tuning", paper=_ROBERTA.format("86.4")),
    ]
    return [*whole, *lora_rows, *linear, *bottlenecks, *prefixes, *prompts, both]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares LoRA with full fine-tuning and the other methods, each at its best size."""
    series: dict[str, list[Summary]] = {}
    for summary in summaries:
        series.setdefault(summary.row.series, []).append(summary)
    best = {name: max(group, key=lambda row: row.mean) for name, group in series.items()}
    adapted = max((best["LoRA, query and value"], best["LoRA, all linear layers"]), key=lambda row: row.mean)
    prefixes = [row.mean for row in series["prefix tuning"]]
    monotone = prefixes == sorted(prefixes)
    return [
        as_good("LoRA is as good as full fine-tuning", adapted, best["full fine-tuning"]),
        *(
            as_good(f"LoRA is as good as {name}, or better", adapted, best[name])
            for name in ("Houlsby adapters", "Pfeiffer adapters", "BitFit", "top layers")
        ),
        better("LoRA is better than prefix tuning", adapted, best["prefix tuning"]),
        better("LoRA is better than prompt tuning", adapted, best["prompt tuning"]),
        Finding(
            "prefix tuning does not improve with every longer prefix",
            "not observed" if monotone else "observed",
            ", ".join(f"{row.row.name}: {row.mean:.1f}" for row in series["prefix tuning"]),
        ),
    ]


STUDY = Study(
    claim="LoRA is as good as full fine-tuning, and better than the other methods for as many parameters",
    source="LoRA, tables 2 and 15, figure 2 (RoBERTa on GLUE; GPT-3 175B on WikiSQL and MNLI)",
    paper="paper: mean of GLUE; WikiSQL / MNLI",
    rows=rows,
    draw=figures.lines,
    findings=findings,
    size=(8.5, 5.2),
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
