"""Compares LoRA with the head alone and full fine-tuning, and shows how to use the result (LoRA paper, table 2)."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.baselines.specs import LINEAR, QUERY_VALUE
from experiments.configs.quickstart import Config
from experiments.errors import UserError
from experiments.reports.findings import Finding
from experiments.reports.page import Grid
from experiments.reports.results import read_json, write_json
from experiments.reports.table import size, spread
from experiments.studies import encoder_export, sentences
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import ADAPTER, Row, Study, Summary
from experiments.studies.comparison.judge import as_good, better
from experiments.studies.problem import HEAD, Problem
from experiments.training.optimizer import adam

_MERGED = "merged.json"


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns the methods of the config.

    Raises:
      UserError: The labels are numbers.
    """
    if problem.task.is_regression:
        raise UserError(f"{config.data}: the labels are numbers, expected classes; glue --methods head,lora fits them")
    return [make_row(name, config) for name in config.methods]


def make_row(name: str, config: Config) -> Row:
    """Returns a method by its name in the config's `methods`."""
    low_rank = lora.LoRA(rank=config.rank, alpha=config.alpha)
    decomposed = lora.DoRA(rank=config.rank, alpha=config.alpha)
    quantized = {LINEAR: lora.NF4()}
    spec, rules, rates = {
        "head": ({}, {}, ()),
        "lora": ({QUERY_VALUE: low_rank, HEAD: lora.Full()}, {}, (config.lora_lr,)),
        "qlora": ({QUERY_VALUE: low_rank, HEAD: lora.Full()}, quantized, (config.lora_lr,)),
        "qdora": ({QUERY_VALUE: decomposed, HEAD: lora.Full()}, quantized, (config.lora_lr,)),
        "all-linear": ({LINEAR: low_rank, HEAD: lora.Full()}, {}, (config.all_linear_lr,)),
        "full": ({"": lora.Full()}, {}, (config.full_lr,)),
    }[name]
    return Row(name, spec, rates, series=name, rules=rules)


def grid(summaries: Sequence[Summary]) -> Grid:
    """Returns what each method costs and reaches; parameters include the head's."""
    score = summaries[0].task.metric.title
    header = ["method", "trained parameters", "Adam state", "adapter file", "seconds"]
    header += [f"validation {score}", summaries[0].title.removesuffix(", %")]
    cells = []
    for summary in summaries:
        outcomes = [outcome for outcome in summary.results if not np.isnan(outcome.validation_accuracy)]
        first = summary.results[0]
        costs = [f"{first.trained_parameters:,}", _adam_state(summary), size(first.adapter_bytes)]
        scores = ["diverged"] * 3
        if outcomes:
            scores = [
                spread([outcome.seconds for outcome in outcomes], "{:.0f}"),
                f"{spread([100 * outcome.validation_accuracy for outcome in outcomes], '{:.1f}')} %",
                f"{spread([100 * outcome.test_accuracy for outcome in outcomes], '{:.1f}')} %",
            ]
        cells.append([summary.row.name, *costs, *scores])
    return Grid(header, cells)


def _adam_state(summary: Summary) -> str:
    """Returns the size of the optimizer's state, computed from shapes."""
    if not summary.row.rates or not summary.contributions:
        return "–"
    index = next(i for i, outcome in enumerate(summary.results) if not np.isnan(outcome.validation_accuracy))
    train = lora.partition(summary.adapter(index))[0]
    state = jax.eval_shape(adam(1.0, 1, warmup=0.0, clip=1.0).init, train)
    return size(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)))


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares the methods that were run, and merged with unmerged predictions."""
    by_name = {summary.row.name: summary for summary in summaries}
    claims = (
        (better, "LoRA is better than the head alone", "lora", "head"),
        (as_good, "LoRA on query and value is as good as full fine-tuning", "lora", "full"),
        (as_good, "LoRA on all linear layers is as good as full fine-tuning", "all-linear", "full"),
        (as_good, "QLoRA is as good as LoRA", "qlora", "lora"),
        (as_good, "QDoRA is as good as QLoRA", "qdora", "qlora"),
    )
    judged = [
        judge(claim, by_name[one], by_name[other])
        for judge, claim, one, other in claims
        if one in by_name and other in by_name
    ]
    return [*judged, *merged_finding([values for summary in summaries for values in _merged(summary)])]


def _merged(summary: Summary) -> list[Mapping[str, float]]:
    """Returns how merged and unmerged outputs for the test examples compare, for each seed; computed once."""
    if not summary.row.rates:
        return []
    problem, values = summary.start.problem, []
    for index, (directory, outcome) in enumerate(zip(summary.directories, summary.results)):
        if np.isnan(outcome.validation_accuracy):
            continue
        if not (directory / _MERGED).exists():
            delta, rules = summary.adapter(index), summary.row.rules
            base = problem.quantize(summary.start.base, rules) if rules else summary.start.base
            unmerged = problem.outputs(base, delta, "test")
            merged = problem.outputs(lora.merge(base, delta), {}, "test")
            same = np.mean(problem.task.predict(merged) == problem.task.predict(unmerged))
            difference = np.abs(merged - unmerged).max()
            write_json(directory / _MERGED, {"agreement": float(same), "difference": float(difference)})
        values.append(read_json(directory / _MERGED, dict))
    return values


def merged_finding(values: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Says whether merged and unmerged predictions agree; nothing without adapters.

    Args:
      values: For each run the fraction of equal predictions (`agreement`) and the largest `difference` of outputs.
    """
    if not values:
        return []
    agreement = min(run["agreement"] for run in values)
    difference = max(run["difference"] for run in values)
    figures = f"{agreement:.2%} of the test examples have the same class, logits differ by at most {difference:.1e}"
    verdict = "observed" if agreement == 1 else "not observed"
    return [Finding("merged and unmerged predictions agree", verdict, figures)]


def after(config: Config, summaries: Sequence[Summary], console: Console) -> None:
    """Writes what opens the results in Python and, with `--export peft`, elsewhere; prints how to use them."""
    last = summaries[-1].directories[-1]
    for summary in summaries:
        for index, directory in enumerate(summary.directories):
            sentences.describe(directory, config.model, summary.start.problem)
            if config.export == "peft" and (directory / ADAPTER).exists() and summary.row.rates:
                _export(summary, index, config.model, console)
    console.print("an adapter for each run is in the directory of the run; in Python, from here:")
    for line in (
        "from experiments.studies import sentences",
        f"print(sentences.load({str(last)!r})('a chess engine that plays over the internet'))",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _export(summary: Summary, index: int, model: str, console: Console) -> None:
    """Writes the adapter of a run in PEFT's format, unless the method has none."""
    if summary.row.name == "full":
        console.print("PEFT: full fine-tuning has no adapter; its weights are in adapter/", highlight=False)
        return
    problem, delta, directory = summary.start.problem, summary.adapter(index), summary.directories[index]
    logits, is_quantized = problem.outputs(problem.base, delta, "test"), bool(summary.row.rules)
    encoder_export.export(problem, delta, model, directory, logits, quantized=is_quantized)
    line = f"PEFT: {directory / encoder_export.DIRECTORY}"
    if is_quantized:
        right = problem.task.score(logits, problem.splits["test"].labels)
        line += f" (trained with NF4 weights; accuracy with the published float weights: {right:.1%})"
    console.print(line, highlight=False, soft_wrap=True)


STUDY = Study(
    claim="LoRA with few trained parameters is better than the head alone, and merging it changes no prediction",
    source="LoRA, table 2 (RoBERTa-base, mean of GLUE: LoRA 87.2, full fine-tuning 86.4)",
    rows=rows,
    draw=figures.curves,
    findings=findings,
    grid=grid,
    size=(11.0, 4.2),
    note="",
    apart=True,
    after=after,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
