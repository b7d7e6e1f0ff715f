"""Scores a base, with and without solved examples in its prompt, and an adapter, unmerged and merged."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.evaluation import tasks
from experiments.evaluation.answers import Answer, Answerer
from experiments.evaluation.decoding import GREEDY
from experiments.evaluation.questions import Question
from experiments.evaluation.scores import Scores, score, table
from experiments.reports.results import read_json, write_json
from experiments.studies.decoder.adapters import trained_in_full
from experiments.studies.sft.assistant import Assistant
from experiments.studies.sft.held_out import SHOTS, HeldOut, Questions, make_all_questions
from experiments.training import outputs, processes
from experiments.training.progress import bar

SCORES = "scores.json"
BASE, BASE_SHOTS, TUNED, MERGED = "base", f"base, {SHOTS} examples in its prompt", "tuned", "tuned, merged"
Variant = tuple[str, Callable[[], tuple[Any, Any]], list[Question]]
"""The name of a model, a function that returns its base and delta, and its questions."""


@outputs.exclusive
def run(
    config: Config, held_out: HeldOut, adapter: Path | None, *, with_base: bool = True, with_table: bool = True
) -> list[Scores]:
    """Answers held-out examples, prints the scores, and writes them and all answers as JSON to `config.out`.

    Args:
      config: The config. Scores of the same answers that its `out` already holds are read.
      held_out: The examples.
      adapter: The adapter; None evaluates the base only.
      with_base: Whether to evaluate the base too.
      with_table: Whether to print the table of scores.

    Raises:
      UserError: Model, adapter or data are missing, malformed or incompatible.
    """
    console = processes.console()
    assistant = Assistant.of(config)
    answerer = Answerer(assistant.model, assistant.decode, assistant.ends)
    questions = make_all_questions(
        config,
        held_out,
        assistant.encoder,
        lambda question: answerer.fits(question, config.new_tokens),
        lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    if not questions.alone:
        raise UserError(f"{held_out.title}: none of the examples is a prompt with an answer that the model supports")
    settings = _settings(config, assistant, questions, adapter, with_base)
    path = config.out / SCORES
    stored = read_json(path, dict) if processes.broadcast(path.is_file()) and not config.fresh else {}
    if stored.get("settings") == settings:
        scores, metrics = [Scores(**row) for row in stored["scores"]], stored.get("metrics", {})
    else:
        if questions.task:  # the metrics of empty answers: a file that they need may be missing
            _task_metrics([Answer("", 0.0, 1)] * len(questions.alone), questions)
        if processes.is_first():
            outputs.claim(config.out, SCORES)
        with jax.set_mesh(assistant.program.mesh):
            variants = list(_variants(*assistant.load(adapter), questions, with_base=with_base))
            answers = {}
            with bar(console, "answers", sum(len(asked) for _, _, asked in variants)) as progress:
                for name, params, asked in variants:
                    report = functools.partial(progress.advance, note=name)
                    answers[name] = answerer.answer(params(), asked, config.new_tokens, report, config.decoding())
        references = [question.reference for question in questions.alone]
        scores = [score(name, rows, references) for name, rows in answers.items()]
        metrics = {name: _task_metrics(rows, questions) for name, rows in answers.items()} if questions.task else {}
        if processes.is_first():
            texts = _texts(questions.alone, answers, assistant.decode)
            record = {"settings": settings, "data": held_out.title, "scores": list(map(asdict, scores))}
            write_json(path, record | {"metrics": metrics, "answers": texts})
    if with_table:
        console.print(table(scores))
    if metrics:
        console.print(tasks.table(metrics))
    console.print(
        f"{scores[0].examples:,} examples of {held_out.title}: perplexity per token of the reference answers, ROUGE-L "
        f"± its standard error, BLEU; all answers are in {path}",
        highlight=False,
        soft_wrap=True,
    )
    return scores


def _task_metrics(answers: list[Answer], questions: Questions) -> dict[str, float]:
    return tasks.evaluate(questions.task or "", [answer.text for answer in answers], questions.answers)


def _variants(base: Any, delta: Any, questions: Questions, *, with_base: bool) -> Iterator[Variant]:
    if with_base or not delta:
        yield BASE, lambda: (base, {}), questions.alone
        if questions.preceded:
            yield BASE_SHOTS, lambda: (base, {}), questions.preceded
    if delta:
        yield TUNED, lambda: (base, delta), questions.alone
        if not trained_in_full(delta):  # else merging changes nothing
            yield MERGED, lambda: (lora.merge(base, delta), {}), questions.alone


def _texts(
    questions: list[Question], answers: dict[str, list[Answer]], decode: Callable[[list[int]], str]
) -> list[dict[str, str]]:
    """Returns for each question its prompt, the reference answer and the answers of all models."""
    return [
        {"prompt": decode(question.prompt.tolist()), "reference": question.reference}
        | {name: rows[number].text for name, rows in answers.items()}
        for number, question in enumerate(questions)
    ]


def _settings(
    config: Config, assistant: Assistant, questions: Questions, adapter: Path | None, with_base: bool
) -> dict[str, Any]:
    """Returns everything that determines the answers."""
    asked = [(q.prompt.tolist(), q.answer.tolist()) for q in (*questions.alone, *questions.preceded)]
    search = {} if config.decoding() == GREEDY else {"decoding": vars(config.decoding())}
    return search | {
        "model": config.model,
        "base": _digest(assistant.directory, "config.json") if assistant.directory.is_dir() else None,
        "adapter": None if adapter is None else _digest(adapter),
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
        "new_tokens": config.new_tokens,
        "quantize": config.quantize,
        "double_quantization": config.double_quantization,
        "dtype": config.dtype,
        "with_base": with_base,
    }


def _digest(directory: Path, pattern: str = "*") -> str:
    """Returns a digest of the files in a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob(pattern)):
        if path.is_file():
            digest.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return digest.hexdigest()
