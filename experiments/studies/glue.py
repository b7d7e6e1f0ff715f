"""Every method that the LoRA paper compares, by trained parameters (LoRA paper, tables 2 and 15, figure 2)."""

from collections.abc import Sequence

import lora_jax as lora
from experiments.baselines import specs
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.glue import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, best, better
from experiments.studies.problem import HEAD, Problem
from experiments.studies.virtual_starts import PREFIX, PROMPT, WithPrefix, WithPrompt

_LATE, _BOTH = "feed_forward/down/kernel", "(attention/output|feed_forward/down)/kernel"
_LORA = {1: "GPT-3 73.4 / 91.3", 8: "RoBERTa 87.2; GPT-3 73.8 / 91.6", 64: "GPT-3 73.5 / 91.4"}
_HOULSBY_PAPER = {8: "GPT-3 73.2 / 91.5", 64: "GPT-3 72.6 / 91.5"}
_PREFIX = {4: "GPT-3 68.5 / 89.2", 16: "GPT-3 70.1 / 89.5", 64: "GPT-3 64.9 / 87.9"}  # PreLayer of as many tokens
_PROMPT = {32: "GPT-3 55.9 / 84.9"}  # PreEmbed
_FULL = "RoBERTa 86.4; GPT-3 73.8 / 89.5"
_BOTH_PAPER = {64: "GPT-3 76.2 / 91.3"}
"""The paper's values by rank, size or number of virtual tokens: RoBERTa-base, the mean of GLUE (table 2); GPT-3 175B,
WikiSQL / MNLI (tables 6 and 15)."""
_SERIES = {
    "head": "head alone",
    "bitfit": "BitFit",
    "top-layers": "top layers",
    "full": "full fine-tuning",
    "lora": "LoRA, query and value",
    "lora-linear": "LoRA, all linear layers",
    "houlsby": "Houlsby adapters",
    "pfeiffer": "Pfeiffer adapters",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
    "lora-prompt": "LoRA and prompt",
}


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns the methods of the config at their sizes."""
    head = {HEAD: lora.Full()}
    adapted = [
        Row(
            f"LoRA on {where}, r = {rank}",
            {pattern: lora.LoRA(rank, config.alpha)} | head,
            config.lr,
            f"LoRA, {where}",
            paper=paper.get(rank, ""),
        )
        for where, pattern, ranks, paper in (
            ("query and value", QUERY_VALUE, config.ranks, _LORA),
            ("all linear layers", LINEAR, config.linear_ranks, {}),
        )
        for rank in ranks
    ]
    bottlenecks = [
        Row(
            f"{name}, size {size}",
            {pattern: lora.Bottleneck(size, activation)} | head,
            config.lr,
            name,
            paper=paper.get(size, ""),
        )
        for name, pattern, activation, paper in (
            ("Houlsby adapters", _BOTH, "swish", _HOULSBY_PAPER),
            ("Pfeiffer adapters", _LATE, "relu", {}),
        )
        for size in config.sizes
    ]
    virtual = [
        Row(
            f"{kind} of {length}",
            {pattern: lora.Full()} | head,
            config.prefix_lr,
            f"{kind} tuning",
            paper=paper.get(length, ""),
            change=change(length),
        )
        for kind, pattern, lengths, change, paper in (
            ("prefix", PREFIX, config.prefixes, WithPrefix, _PREFIX),
            ("prompt", PROMPT, config.prompts, WithPrompt, _PROMPT),
        )
        for length in lengths
    ]
    both = Row(
        f"LoRA, r = {max(config.ranks)}, with a prompt of {config.prompts[0]}",
        {QUERY_VALUE: lora.LoRA(max(config.ranks), config.alpha), PROMPT: lora.Full()} | head,
        config.lr,
        "LoRA and prompt",
        paper=_BOTH_PAPER.get(max(config.ranks), ""),
        change=WithPrompt(config.prompts[0]),
    )
    count = min(2, problem.shape.layers)
    whole = [
        Row("head alone", {}, series="head alone"),
        Row("BitFit", specs.bitfit(problem.base) | head, config.lr, "BitFit", paper="RoBERTa 85.2; GPT-3 71.3 / 91.0"),
        Row(f"top {count} layers", specs.top_layers(problem.base, count) | head, config.full_lr, "top layers"),
        Row(
            "full fine-tuning",
            specs.full(),
            config.full_lr,
            "full fine-tuning",
            paper=_FULL,
        ),
    ]
    names = {series: name for name, series in _SERIES.items()}
    every = [*whole, *adapted, *bottlenecks, *virtual, both]
    return [row for row in every if names[row.series] in config.methods]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares LoRA with full fine-tuning and the other methods that were run, each at its best size."""
    series: dict[str, list[Summary]] = {}
    for summary in summaries:
        series.setdefault(summary.row.series, []).append(summary)
    selected = {name: best(group) for name, group in series.items()}
    adapted = [selected[name] for name in ("LoRA, query and value", "LoRA, all linear layers") if name in selected]
    if not adapted:
        return []
    claims = {
        "full fine-tuning": (as_good, "LoRA is as good as full fine-tuning"),
        **{
            name: (as_good, f"LoRA is as good as {name}, or better")
            for name in ("Houlsby adapters", "Pfeiffer adapters", "BitFit", "top layers")
        },
        "prefix tuning": (better, "LoRA is better than prefix tuning"),
        "prompt tuning": (better, "LoRA is better than prompt tuning"),
    }
    result = [
        judge(claim, best(adapted), selected[name]) for name, (judge, claim) in claims.items() if name in selected
    ]
    if "prefix tuning" in series:
        longest = max(series["prefix tuning"], key=lambda row: row.parameters)
        result.append(better("a longer prefix may be worse than a shorter one", selected["prefix tuning"], longest))
    return result


STUDY = Study(
    claim="LoRA is as good as full fine-tuning, and the other methods are not better, each at its best size",
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
