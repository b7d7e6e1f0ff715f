"""Every method that the LoRA paper compares, by trained parameters (LoRA paper, tables 2 and 15, figure 2)."""

from collections.abc import Sequence
from dataclasses import replace

import lora_jax as lora
from experiments.baselines import specs
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.glue import Config
from experiments.reports.findings import Finding
from experiments.studies import glue_results
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, best, better
from experiments.studies.problem import HEAD, Problem
from experiments.studies.virtual_starts import PREFIX, PROMPT, WithPrefix, WithPrompt

_LATE, _BOTH = "feed_forward/down/kernel", "(attention/output|feed_forward/down)/kernel"
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
    "adapter-drop": "AdapterDrop",
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
        )
        for where, pattern, ranks in (
            ("query and value", QUERY_VALUE, config.ranks),
            ("all linear layers", LINEAR, config.linear_ranks),
        )
        for rank in ranks
    ]
    bottlenecks = [
        Row(
            f"{name}, size {size}",
            {pattern: lora.Bottleneck(size, activation)} | head,
            config.lr,
            name,
        )
        for name, pattern, activation in (
            ("Houlsby adapters", _BOTH, "swish"),
            ("Pfeiffer adapters", _LATE, "relu"),
        )
        for size in config.sizes
    ]
    virtual = [
        Row(
            f"{kind} of {length}",
            {pattern: lora.Full()} | head,
            config.prefix_lr,
            f"{kind} tuning",
            change=change(length),
        )
        for kind, pattern, lengths, change in (
            ("prefix", PREFIX, config.prefixes, WithPrefix),
            ("prompt", PROMPT, config.prompts, WithPrompt),
        )
        for length in lengths
    ]
    both = Row(
        f"LoRA, r = {max(config.ranks)}, with a prompt of {config.prompts[0]}",
        {QUERY_VALUE: lora.LoRA(max(config.ranks), config.alpha), PROMPT: lora.Full()} | head,
        config.lr,
        "LoRA and prompt",
        change=WithPrompt(config.prompts[0]),
    )
    count = min(2, problem.shape.layers)
    whole = [
        Row("head alone", {}, series="head alone"),
        Row("BitFit", specs.bitfit(problem.base) | head, config.lr, "BitFit"),
        Row(f"top {count} layers", specs.top_layers(problem.base, count) | head, config.full_lr, "top layers"),
        Row("full fine-tuning", specs.full(), config.full_lr, "full fine-tuning"),
    ]
    names = {series: name for name, series in _SERIES.items()}
    every = [*whole, *adapted, *bottlenecks, *virtual, both, *_adapter_drop(config, problem)]
    return [
        replace(row, paper=glue_results.of(config, row.name)) for row in every if names[row.series] in config.methods
    ]


def _adapter_drop(config: Config, problem: Problem) -> list[Row]:
    """Returns Pfeiffer adapters in the last third of the layers, and in all: AdapterDrop drops those of the first."""
    layers, size = problem.shape.layers, problem.shape.width // 16
    return [
        Row(
            f"AdapterDrop, size {size}, {count} layers",
            {
                rf"layers/({'|'.join(map(str, range(layers - count, layers)))})/{_LATE}": lora.Bottleneck(size, "relu"),
                HEAD: lora.Full(),
            },
            config.lr,
            "AdapterDrop",
        )
        for count in dict.fromkeys((max(1, layers // 3), layers))
    ]


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
            for name in ("Houlsby adapters", "Pfeiffer adapters", "AdapterDrop", "BitFit", "top layers")
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
