"""Prompts that begin with an instruction and solved problems."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile

import numpy as np

from experiments.input.answers import AnswerEncoder
from experiments.input.encoding import Encoded
from experiments.input.records import Message, Problem, Record
from experiments.input.tokenized import Tokenized


@dataclass(frozen=True)
class InstructedEncoder:
    """Encodes the prompts of problems with an instruction, for :func:`experiments.input.tokenized.tokenize`.

    Attributes:
      encoder: The encoder of problems.
      instruction: The instruction.
      examples: Solved problems that follow the instruction.
    """

    encoder: AnswerEncoder
    instruction: str
    examples: tuple[Problem, ...] = ()

    @property
    def notes(self) -> Counter[str]:
        """See :class:`AnswerEncoder`."""
        return self.encoder.notes

    @property
    def digest(self) -> str:
        """A digest of everything that determines the tokens."""
        return hashlib.sha256(f"{self.instruction} {self.examples} {self.encoder.digest}".encode()).hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id that may occur."""
        return self.encoder.largest

    def encode_each(self, records: Sequence[Record], locations: Sequence[str]) -> list[list[Encoded]]:
        """Returns the prompt of each record."""
        asked = [instruct(record, self.instruction, self.examples) for record in records]
        return self.encoder.encode_each(asked, locations)


def instruct(record: Record, instruction: str, examples: Sequence[Problem] = ()) -> Record:
    """Returns a problem with an instruction and solved problems before its prompt.

    They are the system message and earlier turns of a conversation, or earlier lines of a text. Examples in the other
    form are left out.

    Example:
      >>> instruct(Problem("1 + 1 =", "2"), "Add.", [Problem("2 + 3 =", "5")]).prompt
      'Add.\\n\\n2 + 3 = 5\\n\\n1 + 1 ='
    """
    if not isinstance(record, Problem):
        return record
    if isinstance(record.prompt, str):
        solved = [f"{one.prompt} {one.answer}" for one in examples if isinstance(one.prompt, str)]
        return replace(record, prompt="\n\n".join([instruction, *solved, record.prompt]))
    turns = [
        message
        for one in examples
        if not isinstance(one.prompt, str)
        for message in (*_without_system(one.prompt), {"role": "assistant", "content": one.answer})
    ]
    return replace(record, prompt=({"role": "system", "content": instruction}, *turns, *_without_system(record.prompt)))


def _without_system(messages: Iterable[Message]) -> Iterable[Message]:
    return dropwhile(lambda message: message["role"] == "system", messages)


class Prompts:
    """Tokenized prompts by the index of their record.

    Args:
      data: The tokens, with one example for each record.

    Attributes:
      length: The number of tokens of the longest prompt.
      shared: The number of tokens with which all prompts begin, except the last token of the shortest.
    """

    def __init__(self, data: Tokenized):
        self._data = data
        self._starts = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
        self._example_of = {owner: number for number, owner in enumerate(data.owners.tolist())}
        self.length = int(data.lengths.max())
        every, masks = self.rows(np.fromiter(self._example_of, int))
        differs = (every != every[0]).any(axis=0) | ~masks.all(axis=0)
        self.shared = int(np.argmax(differs)) if differs.any() else self.length
        self.shared = min(self.shared, int(data.lengths.min()) - 1)

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and masks `[prompts, length]`, padded on the right; no tokens for a negative index."""
        tokens = np.zeros((len(index), self.length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, number in enumerate(index.tolist()):
            if number >= 0:
                example = self._example_of[number]
                size, start = self._data.lengths[example], self._starts[example]
                tokens[row, :size], mask[row, :size] = self._data.tokens[start : start + size], True
        return tokens, mask
