"""Trains and scores the methods of each task by supervised fine-tuning, and writes the results."""

import dataclasses
import gzip
import json
import math
from collections.abc import Mapping, Sequence

from experiments.configs import sft
from experiments.configs.data_to_text import Config
from experiments.configs.decoder import Target
from experiments.evaluation.scores import Scores
from experiments.reports.page import FILES
from experiments.reports.results import read_json
from experiments.studies import provenance
from experiments.studies.data_to_text import report
from experiments.studies.data_to_text.report import Measured
from experiments.studies.sft import evaluation, study
from experiments.studies.sft.held_out import find_held_out
from experiments.studies.sft.report import BEST
from experiments.tasks import examples
from experiments.tasks.sql_questions import queries
from experiments.training import outputs, processes

METHODS: dict[str, tuple[Target, ...]] = {
    report.QUERY_VALUE: ("query", "value"),
    report.LINEAR: ("attention", "feed-forward"),
}
"""The adapted weights by the name of the method."""

_SQL = "sql_questions"


@outputs.exclusive
def run(config: Config) -> list[Measured]:
    """Runs or resumes the study, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run` and :func:`experiments.studies.sft.evaluation.run`.
    """
    outputs.claim(config.out, *FILES)
    console = processes.console()
    minutes = "" if config.fast else f"about {config.MINUTES} minutes on 2 CPU cores; "
    console.print(
        f"{len(config.tasks) * len(METHODS)} runs; {minutes}after an interruption, the same command resumes",
        highlight=False,
    )
    rows: list[Measured] = []
    for task in config.tasks:
        for number, (method, targets) in enumerate(METHODS.items()):
            console.rule(f"{task}, {method}")
            rows += _measure(task, method, _run_config(config, task, targets), with_base=number == 0)
    report.page(config, rows).publish(config, provenance.record(config), console)
    return rows


def _run_config(config: Config, task: str, targets: tuple[Target, ...]) -> sft.Config:
    return dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=(task,),
        template=config.template,
        targets=targets,
        rank=config.rank,
        lr=config.lr,
        length=config.length,
        epochs=config.steps,  # at least one step each
        steps=config.steps,
        validation_examples=0,
        test_examples=config.test_examples,
        samples=0,
        new_tokens=config.new_tokens,
        seed=config.seed,
        out=config.out / f"{task}-{'-'.join(targets)}",
        fresh=config.fresh,
    )


def _measure(task: str, method: str, config: sft.Config, *, with_base: bool) -> list[Measured]:
    """Trains a method, and scores its answers and, with the first method of a task, those of the base."""
    trained = study.run(config)
    held_out = find_held_out(config)
    assert held_out is not None, "every task has a test split"
    scores = evaluation.run(config, held_out, config.out / BEST, with_base=with_base)
    answers = read_json(config.out / evaluation.SCORES, lambda content: content["answers"])
    tables = _tables(answers) if task == _SQL else None
    names = {evaluation.TUNED: method, evaluation.BASE: report.BASE, evaluation.BASE_SHOTS: report.SHOTS}
    return [
        _measured(task, names[row.name], trained.trained_parameters, row, answers, tables)
        for row in scores
        if row.name in names
    ]


def _measured(
    task: str,
    method: str,
    parameters: int,
    scores: Scores,
    answers: Sequence[Mapping[str, str]],
    tables: Sequence[queries.Table] | None,
) -> Measured:
    forms = results = None
    if tables is not None:
        texts, references = [[answer[name] for answer in answers] for name in (scores.name, "reference")]
        forms, results = queries.accuracies(texts, references, tables)
    error = scores.rouge_l_error
    if results is not None:
        share = results / 100
        error = 100 * math.sqrt(share * (1 - share) / len(answers))
    return Measured(
        task=task,
        method=method,
        parameters=0 if method in (report.BASE, report.SHOTS) else parameters,
        perplexity=scores.perplexity,
        rouge_l=scores.rouge_l,
        bleu=scores.bleu,
        logical_form=forms,
        execution=results,
        error=error,
    )


def _tables(answers: Sequence[Mapping[str, str]]) -> list[queries.Table]:
    """Returns the table of each answer's question."""
    path = examples.SHIPPED[_SQL] / "test.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    questions = {row["messages"][1]["content"]: row["table"] for row in rows}
    return [next(questions[text] for text in questions if text in answer["prompt"]) for answer in answers]
