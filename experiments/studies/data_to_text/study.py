"""Trains and scores the methods of each task by supervised fine-tuning, and writes the results."""

import dataclasses
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.configs import sft
from experiments.configs.data_to_text import METHODS, Config
from experiments.errors import UserError
from experiments.evaluation import queries, texts
from experiments.evaluation.scores import Scores
from experiments.input import sources
from experiments.reports.page import FILES
from experiments.reports.results import read_json
from experiments.studies import provenance
from experiments.studies.data_to_text import report
from experiments.studies.data_to_text.report import Measured
from experiments.studies.sft import evaluation, study
from experiments.studies.sft.held_out import HeldOut, find_held_out, read_named
from experiments.studies.sft.report import BEST
from experiments.tasks import examples
from experiments.tasks.sql_questions.tables import Table
from experiments.training import outputs, processes

_SQL = "sql_questions"
_DECIDING = {_SQL: "execution", "wikisql": "logical_form"}
"""The metric that decides, of tasks with queries; otherwise ROUGE-L."""

_SPLITS = {"wikisql": "validation"}
"""The split that the paper scores, if it is not the test split."""


@outputs.exclusive
def run(config: Config) -> list[Measured]:
    """Runs or resumes the study, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run` and :func:`experiments.studies.sft.evaluation.run`.
    """
    tasks = config.sources()
    outputs.claim(config.out, *FILES)
    console = processes.console()
    minutes = "" if config.fast or config.data else f"about {config.MINUTES} minutes on 2 CPU cores; "
    console.print(
        f"{len(tasks) * len(config.methods)} runs; {minutes}after an interruption, the same command resumes",
        highlight=False,
    )
    rows: list[Measured] = []
    for task, data in tasks.items():
        for number, method in enumerate(config.methods):
            console.rule(f"{task}, {report.TITLES[method]}")
            run_config = _run_config(config, task, data, method)
            rows += _measure(task, method, run_config, with_base=number == 0)
    report.page(config, rows).publish(config, provenance.record(config), console)
    return rows


def _run_config(config: Config, task: str, data: str, method: str) -> sft.Config:
    targets, full = METHODS[method], method == "full"
    of_method: dict[str, Any] = {"method": "full"} if full else {"targets": targets, "rank": config.rank}
    return dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=(data,),
        template=config.template,
        lr=config.full_lr if full else config.lr,
        length=config.length,
        validation_examples=0,
        test_examples=config.test_examples,
        samples=0,
        new_tokens=config.new_tokens,
        seed=config.seed,
        out=config.out / f"{task}-{'-'.join(targets) or method}",
        fresh=config.fresh,
        **of_method,
        **config.fine_tuning(full=full),
        **vars(config.decoding()),
    )


def _measure(task: str, method: str, config: sft.Config, *, with_base: bool) -> list[Measured]:
    """Trains a method, and scores its answers and, with the first method of a task, those of the base."""
    held_out = _held_out(task, config)  # before training, in case files are missing
    trained = study.run(config)
    if config.method == "full" and processes.is_first():
        outputs.clear(config.out, "checkpoints")  # of three times the weights
    scores = evaluation.run(config, held_out, config.out / BEST, with_base=with_base)
    answers, official = read_json(
        config.out / evaluation.SCORES, lambda content: (content["answers"], content["metrics"])
    )
    tables = _tables(answers) if task == _SQL else None
    names = {evaluation.TUNED: method, evaluation.BASE: report.BASE, evaluation.BASE_SHOTS: report.SHOTS}
    return [
        _measured(
            task,
            names[row.name],
            trained.trained_parameters if row.name == evaluation.TUNED else 0,
            row,
            official.get(row.name) or _metrics(row, answers, tables),
        )
        for row in scores
        if row.name in names
    ]


def _held_out(task: str, config: sft.Config) -> HeldOut:
    split = _SPLITS.get(task)
    if split is not None:
        named = dataclasses.replace(config, data=(f"{config.data[0]}:{split}",))
        return read_named(named, train=sources.splits(config.data)[0])
    held_out = find_held_out(config)
    if held_out is None:
        raise UserError(f"--data {config.data[0]}: no test examples to answer")
    return held_out


def _metrics(scores: Scores, answers: Sequence[Mapping[str, str]], tables: Sequence[Table] | None) -> dict[str, float]:
    """Returns the metrics of a shipped task."""
    generated, references = [[answer[name] for answer in answers] for name in (scores.name, "reference")]
    chrf = texts.chrf(generated, [[reference] for reference in references])
    metrics = {"rouge_l": scores.rouge_l, "bleu": scores.bleu, "chrf": chrf}
    return metrics if tables is None else metrics | queries.score_tables(generated, references, tables)


def _measured(task: str, method: str, parameters: int, scores: Scores, metrics: Mapping[str, float]) -> Measured:
    score, error = scores.rouge_l, scores.rouge_l_error
    if task in _DECIDING:
        score = metrics[_DECIDING[task]]
        error = math.sqrt(score * (100 - score) / scores.examples)
    return Measured(
        task=task,
        method=method,
        parameters=parameters,
        perplexity=scores.perplexity,
        metrics=dict(metrics),
        score=score,
        error=error,
    )


def _tables(answers: Sequence[Mapping[str, str]]) -> list[Table]:
    """Returns the table of each answer's question."""
    path = examples.SHIPPED[_SQL] / "test.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    questions = {row["messages"][1]["content"]: row["table"] for row in rows}
    return [next(questions[text] for text in questions if text in answer["prompt"]) for answer in answers]
