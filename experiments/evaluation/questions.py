"""Prompts with a reference answer from training records, optionally preceded by solved examples."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.input.encoding import Encoder
from experiments.input.records import Completion, Conversation, Message, Record, Text


@dataclass(frozen=True)
class Question:
    """A prompt and its reference answer.

    Attributes:
      prompt: `int32[n]`, the tokens of the prompt, at least one.
      answer: `int32[m]`, the tokens of the reference answer, with the token that ends it.
      reference: The reference answer as text.
    """

    prompt: np.ndarray
    answer: np.ndarray
    reference: str


def make_questions(encoder: Encoder, records: Sequence[Record], locations: Sequence[str]) -> list[Question | None]:
    """Returns a question for each record: the last answer of a conversation, a completion, or half of a text.

    It is None for records without a prompt or an answer, or whose answer the loss does not cover.

    Args:
      encoder: The encoder of the checkpoint.
      records: Conversations, completions or texts.
      locations: The location of each record, for error messages.

    Raises:
      UserError: See :meth:`experiments.input.encoding.Encoder.encode_each`.
    """
    options = dataclasses.replace(encoder.options, train_on="last")
    encoder = dataclasses.replace(encoder, options=options, notes=Counter())
    encoded = encoder.encode_each(records, locations)
    return [
        _question(encoder, record, location, examples[-1].tokens, examples[-1].targets) if examples else None
        for record, location, examples in zip(records, locations, encoded)
    ]


def _question(
    encoder: Encoder, record: Record, location: str, tokens: np.ndarray, targets: np.ndarray
) -> Question | None:
    last = np.flatnonzero(targets)[-1] + 1 if targets.any() else len(tokens)
    if isinstance(record, Text):
        middle = max(last // 2, 1)
        reference = encoder.tokenizer.decode(tokens[middle:last].tolist(), skip_special_tokens=True)
        return _new_question(tokens[:middle], tokens[middle:last], reference)
    prompt, reference = encoder.encode_prompt(record, location)
    # The template may render an answered prompt differently from one that waits for its answer.
    begins = np.array_equal(tokens[: len(prompt)], prompt)
    first = len(prompt) if begins else np.argmax(targets)
    return _new_question(prompt, tokens[first:last], reference)


def _new_question(prompt: np.ndarray, answer: np.ndarray, reference: str) -> Question | None:
    reference = reference.strip()
    return Question(prompt, answer, reference) if len(prompt) and len(answer) and reference else None


def precede(record: Record, solved: Sequence[Record]) -> Record:
    """Returns a record whose prompt begins with solved examples: earlier turns of a conversation, or earlier texts.

    Args:
      record: A conversation, completion or text.
      solved: Records of the same form.

    Example:
      >>> precede(Completion("3:", " three"), [Completion("1:", " one"), Completion("2:", " two")])
      Completion(prompt='1: one\\n2: two\\n3:', completion=' three')
    """
    if isinstance(record, Conversation):
        is_system = [message["role"] in ("system", "developer") for message in record.messages]
        start = is_system.index(False) if False in is_system else len(is_system)
        turns = [message for other in solved for message in _turns(other)]
        messages = (*record.messages[:start], *turns, *record.messages[start:])
        return dataclasses.replace(record, messages=messages, learn_from=record.learn_from + len(turns))
    before = "".join(f"{text}\n" for other in solved if (text := _plain(other)))
    if isinstance(record, Completion):
        return Completion(before + record.prompt, record.completion)
    return record


def _turns(record: Record) -> list[Message]:
    """Returns the messages of a record without those that state the task."""
    if isinstance(record, Conversation):
        return [message for message in record.messages if message["role"] not in ("system", "developer")]
    return []


def _plain(record: Record) -> str:
    return record.prompt + record.completion if isinstance(record, Completion) else ""
