"""The losses of examples, and differences of two models' losses with standard errors."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np

from experiments.configs.forgetting import Config
from experiments.configs.sft import Config as Sft
from experiments.errors import UserError
from experiments.evaluation.answers import Answer, Answerer
from experiments.evaluation.questions import Question, make_questions
from experiments.input import sources
from experiments.input.records import Text
from experiments.studies.sft.assistant import Assistant
from experiments.studies.sft.held_out import find_held_out


@dataclass(frozen=True)
class Losses:
    """Losses of the same examples as of other models.

    Attributes:
      sums: The summed loss of each example, in nats.
      tokens: The number of its tokens.
    """

    sums: Sequence[float]
    tokens: Sequence[int]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Losses":
        """Returns the losses of reference answers."""
        return cls([answer.loss for answer in answers], [answer.tokens for answer in answers])

    @property
    def mean(self) -> float:
        """The loss per token in nats."""
        return sum(self.sums) / sum(self.tokens)

    def minus(self, other: "Losses") -> tuple[float, float]:
        """Returns the difference of the losses per token, and its standard error over the examples, which are paired.

        Example:
          >>> one, other = Losses([4.0, 6.0], [2, 2]), Losses([2.0, 2.0], [2, 2])
          >>> one.minus(other)
          (1.5, 0.5)
        """
        differences, tokens = np.subtract(self.sums, other.sums), np.asarray(self.tokens)
        mean, count = differences.sum() / tokens.sum(), len(tokens)
        if count == 1:
            return float(mean), math.nan
        spread = np.sum(np.square(differences - mean * tokens)) * count / (count - 1)
        return float(mean), math.sqrt(spread) / float(tokens.sum())


@dataclass(frozen=True)
class Examples:
    """Held-out examples of the new task, and other text.

    Attributes:
      task: The examples of the task; the loss is that of the answer.
      other: The texts; the loss is that of the second half.
    """

    task: list[Question]
    other: list[Question]

    @property
    def digest(self) -> str:
        """A digest of all tokens."""
        tokens = [(question.prompt.tolist(), question.answer.tolist()) for question in (*self.task, *self.other)]
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def read_examples(config: Config, run_config: Sft) -> Examples:
    """Reads the examples that all runs of the study are measured on.

    Raises:
      UserError: Model or data are missing, or the data has no held-out examples.
    """
    assistant = Assistant.of(run_config)
    held_out = find_held_out(run_config)
    if held_out is None:
        raise UserError(f"{' and '.join(config.data)}: no test or validation examples to measure the new task on")
    records = sources.first(held_out.records, min(config.examples, len(held_out.records)))
    names = sorted(name for name, text in topics.items() if len(text) >= config.characters)[: config.examples]
    texts = [Text(topics[name][: config.characters]) for name in names]
    locations = [records.location(number) for number in range(len(records))]
    answerer, encoder = _answerer(assistant), assistant.encoder

    def fitting(questions: Sequence[Question | None], title: str) -> list[Question]:
        fits = [question for question in questions if question is not None and answerer.fits(question, 1)]
        if not fits:
            raise UserError(f"{title}: {config.model} supports the length of none of the texts")
        return fits

    task = fitting(make_questions(encoder, list(records), locations), held_out.title)
    other = fitting(make_questions(encoder, texts, names), "the language reference of Python")
    return Examples(task, other)


def measure(run_config: Sft, adapter: Path | None, examples: Examples) -> tuple[Losses, Losses]:
    """Returns the losses of the task and of other text, with an adapter or without."""
    assistant = Assistant.of(run_config)
    with jax.set_mesh(assistant.program.mesh):
        params, answerer = assistant.load(adapter), _answerer(assistant)
        task, other = (Losses.of(answerer.answer(params, part, 1)) for part in (examples.task, examples.other))
    return task, other


def _answerer(assistant: Assistant) -> Answerer:
    return Answerer(assistant.model, assistant.decode, assistant.ends)
