"""Encodes the records of post-training: both answers of a preference, a rated answer, the prompt of a problem.

Each is encoded as `sft` encodes a conversation or a completion, with its checks and errors: the prompt is not trained
on, and an answer ends with the token that ends it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.errors import UserError
from experiments.input.encoding import Encoded, Encoder
from experiments.input.records import (
    Completion,
    Conversation,
    Message,
    Preference,
    Problem,
    Prompt,
    Rated,
    Record,
    Tool,
)


@dataclass(frozen=True)
class AnswerEncoder:
    """Converts preferences, rated answers or problems to examples, for :func:`experiments.input.tokenized.tokenize`.

    A :class:`Preference` has two examples, chosen and rejected; a :class:`Rated` has one; a :class:`Problem` has one
    without targets, which is its prompt.

    Attributes:
      encoder: The encoder of the checkpoint.
    """

    encoder: Encoder

    def __post_init__(self) -> None:
        if self.encoder.options.train_on == "all":
            raise UserError("--train-on all: the objective compares answers, whose prompts are not trained on")

    @property
    def notes(self) -> Counter[str]:
        """Notes for the user about the records encoded so far, with the number of records that each concerns."""
        return self.encoder.notes

    @property
    def digest(self) -> str:
        """A digest of everything that determines the tokens."""
        return hashlib.sha256(f"answers {self.encoder.digest}".encode()).hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id that may occur."""
        return self.encoder.largest

    def encode_each(self, records: Sequence[Record], locations: Sequence[str]) -> list[list[Encoded]]:
        """Returns the examples of each record.

        Raises:
          UserError: A record is of another kind, or its answers have the same tokens or none; see also
            :meth:`experiments.input.encoding.Encoder.encode_each`.
        """
        texts: list[tuple[Conversation | Completion, str, int]] = []
        for number, (record, location) in enumerate(zip(records, locations)):
            if isinstance(record, Preference):
                sides: tuple[tuple[Literal["chosen", "rejected"], Prompt], ...]
                sides = (("chosen", record.chosen), ("rejected", record.rejected))
                for name, answer in sides:
                    texts.append((_join(record.prompt, answer, record.tools), f"{location}, {name}", number))
            elif isinstance(record, Rated):
                texts.append((_join(record.prompt, record.completion, record.tools), location, number))
            elif not isinstance(record, Problem):
                raise UserError(f"{location}: got a {type(record).__name__.lower()} record, expected a preference")
        encoded = self.encoder.encode_each([text for text, _, _ in texts], [location for _, location, _ in texts])
        examples: list[list[Encoded]] = [[] for _ in records]
        for (_, location, number), parts in zip(texts, encoded):
            examples[number].append(_only(parts, location))
        for number, (record, location) in enumerate(zip(records, locations)):
            if isinstance(record, Problem):
                examples[number] = [self._prompt(record, location)]
            elif isinstance(record, Preference):
                chosen, rejected = examples[number]
                if not np.array_equal(chosen.tokens, rejected.tokens):
                    continue
                raise UserError(f"{location}: chosen and rejected have the same tokens; expected answers that differ")
        return examples

    def _prompt(self, record: Problem, location: str) -> Encoded:
        """Returns the tokens with which the model is prompted."""
        tokens, _ = self.encoder.encode_prompt(_join(record.prompt, "?", record.tools), location)
        return Encoded(tokens, np.zeros(len(tokens), bool))


def _join(prompt: Prompt, answer: Prompt, tools: tuple[Tool, ...] | None) -> Conversation | Completion:
    """Returns a prompt and an answer as a record of sft."""
    if isinstance(prompt, str) and isinstance(answer, str) and not tools:
        return Completion(prompt, answer)
    before, after = _as_messages(prompt, "user"), _as_messages(answer, "assistant")
    return Conversation((*before, *after), tools, learn_from=len(before))


def _as_messages(value: Prompt, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": value},) if isinstance(value, str) else value


def _only(parts: Sequence[Encoded], location: str) -> Encoded:
    """Returns the only example of an answer, which has targets."""
    if len(parts) != 1:
        raise UserError(
            f"{location}: the template renders {len(parts) or 'no'} separate answers, expected one; use a prompt with "
            "all turns but the last"
        )
    if not parts[0].targets[1:].any():
        raise UserError(f"{location}: the answer has no tokens to train on")
    return parts[0]
