"""Which weights to adapt with a fixed number of parameters (LoRA paper, §7.1 and table 5)."""

from collections.abc import Sequence
from itertools import combinations

import lora_jax as lora
from experiments.baselines.specs import LINEAR
from experiments.configs.which_weights import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, paper, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good, best, better
from experiments.studies.problem import HEAD, Problem

_NAMES = {"q": "query", "k": "key", "v": "value", "o": "output"}
_PAPER = {
    "q": "70.4 / 91.0",
    "k": "70.0 / 90.8",
    "v": "73.0 / 91.0",
    "o": "73.2 / 91.3",
    "q, k": "71.4 / 91.3",
    "q, v": "73.7 / 91.3",
    "q, k, v, o": "73.7 / 91.7",
}
_QUERY = "attention/query/kernel"


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns a row for each subset of the attention weights, for the feed-forward and for all linear weights."""
    subsets = [subset for count in range(1, 5) for subset in combinations(_NAMES, count)]
    attention = [
        _row(
            config,
            problem,
            ", ".join(subset),
            f"attention/({'|'.join(_NAMES[name] for name in subset)})/kernel",
            f"{len(subset)} weights of attention",
        )
        for subset in subsets
    ]
    return [
        Row("head alone", {}, series="head alone"),
        *attention,
        _row(config, problem, "feed-forward", "feed_forward/.*kernel", "feed-forward"),
        _row(config, problem, "all linear", LINEAR, "all linear"),
    ]


def _row(config: Config, problem: Problem, name: str, pattern: str, series: str) -> Row:
    rank = max(1, round(config.budget * problem.rank_one(_QUERY) / problem.rank_one(pattern)))
    spec = {pattern: lora.LoRA(rank, alpha=config.alpha), HEAD: lora.Full()}
    results = paper.of_gpt3(config, _PAPER.get(name, ""))
    return Row(f"{name}, r = {rank}", spec, (config.lr,), series=series, paper=results)


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares one weight of a large rank with several of a small one, and the feed-forward layers with attention."""
    by_name = {summary.row.name.rsplit(", r", 1)[0]: summary for summary in summaries}
    single = best([by_name[name] for name in _NAMES])
    alone = best([by_name[name] for name in ("q", "k")])
    every = by_name["q, k, v, o"]
    return [
        better("several weights of a small rank are better than one of a large rank", every, single),
        better("query and value are better than query or key alone", by_name["q, v"], alone),
        as_good("query and value are as good as all four weights", by_name["q, v"], every),
    ]


STUDY = Study(
    claim="With a fixed number of parameters, adapting several weights of attention is better than one.",
    source="LoRA, table 5 (GPT-3 175B)",
    paper="paper: WikiSQL / MNLI",
    rows=rows,
    draw=figures.bars,
    findings=findings,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
