"""Held-out examples of a run's data, as prompts with and without solved examples before them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.configs.sft import Config
from experiments.evaluation import tasks
from experiments.evaluation.questions import Question, make_questions, precede
from experiments.input import sources
from experiments.input.checking import check_records
from experiments.input.encoding import Encoder
from experiments.input.records import Text
from experiments.input.sources import Records
from experiments.studies.sft.splits import read_splits

SHOTS = 3
"""The number of solved examples in the prompt of the base."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples.

    Attributes:
      title: The data and the split, for the user.
      records: The examples.
      train: Training examples of the same task; None if there are none.
    """

    title: str
    records: Records
    train: Records | None


def find_held_out(config: Config) -> HeldOut | None:
    """Returns the test examples of a config's data, otherwise its validation examples; None if there are none.

    Raises:
      UserError: Data is missing or empty.
    """
    names = sources.unweighted(config.data)
    train, validation = read_splits(config)
    test = sources.read_separate(config.data, "test", config.data_form)
    if test is not None:
        return HeldOut(f"{names} (test)", test, train)
    return None if validation is None else HeldOut(f"{names} (validation)", validation, train)


def read_named(config: Config, *, train: Records | None) -> HeldOut:
    """Returns the held-out examples of a config's data; if it is not split, all examples.

    Args:
      config: The config.
      train: Training examples of the same task, for data that is not split.

    Raises:
      UserError: Data is missing or empty.
    """
    separate = find_held_out(config)
    records, _ = sources.splits(config.data, form=config.data_form)
    return separate or HeldOut(sources.unweighted(config.data), records, train)


@dataclass(frozen=True)
class Questions:
    """The same questions without and with solved examples before them.

    Attributes:
      alone: The questions.
      preceded: The questions with solved examples before them; empty if that is impossible.
      task: The official data set whose metrics apply; None if there are none.
      answers: What these metrics compare each answer with.
    """

    alone: list[Question]
    preceded: list[Question]
    task: str | None = None
    answers: Sequence[Any] = ()


def make_all_questions(
    config: Config,
    held_out: HeldOut,
    encoder: Encoder,
    fits: Callable[[Question], bool],
    report: Callable[[str], None],
) -> Questions:
    """Returns the questions of the first held-out examples.

    Args:
      config: The config, whose `test_examples` is their number.
      held_out: The examples.
      encoder: The encoder of the checkpoint.
      fits: Whether the model supports the length of a question with its answer.
      report: Called with a sentence about questions that are left out.

    Raises:
      UserError: A record is malformed or cannot be encoded.
    """
    records = _first(held_out.records, config.test_examples, config)
    solved = [] if held_out.train is None else list(_first(held_out.train, SHOTS, config))
    locations = [records.location(i) for i in range(len(records))]
    task, answers = sources.official_answers(records) or (None, [None] * len(records))
    task = task if task in tasks.TASKS else None
    pairs = zip(
        make_questions(encoder, list(records), locations),
        make_questions(encoder, [precede(record, solved) for record in records], locations),
        answers,
    )
    pairs = [(one, two, answer) for one, two, answer in pairs if one is not None and two is not None and fits(one)]
    if len(pairs) < len(records):
        report(
            f"{len(records) - len(pairs)} of {len(records)} examples are left out: they have no prompt or no answer, "
            "or are longer than the model supports"
        )
    alone, preceded, answers = [one for one, _, _ in pairs], [two for _, two, _ in pairs], [row[2] for row in pairs]
    if not solved or any(isinstance(record, Text) for record in (*records, *solved)):
        return Questions(alone, [], task, answers)  # a text without a prompt does not show how to answer one
    if not all(map(fits, preceded)):
        report(f"the base does not answer with {SHOTS} examples in its prompt: it does not support prompts that long")
        return Questions(alone, [], task, answers)
    return Questions(alone, preceded, task, answers)


def _first(records: Records, count: int | None, config: Config) -> Records:
    """Returns the first well-formed records; None keeps all."""
    return check_records(sources.first(records, min(count or len(records), len(records))), on_bad=config.on_bad)[0]
