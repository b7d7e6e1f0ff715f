"""Prompts that begin with an instruction."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile

import numpy as np

from experiments.input.answers import AnswerEncoder
from experiments.input.encoding import Encoded
from experiments.input.records import Problem, Record
from experiments.input.tokenized import Tokenized


@dataclass(frozen=True)
class InstructedEncoder:
    """Encodes the prompts of problems with an instruction, for :func:`experiments.input.tokenized.tokenize`.

    Attributes:
      encoder: The encoder of problems.
      instruction: The instruction.
    """

    encoder: AnswerEncoder
    instruction: str

    @property
    def notes(self) -> Counter[str]:
        """See :class:`AnswerEncoder`."""
        return self.encoder.notes

    @property
    def digest(self) -> str:
        """A digest of everything that determines the tokens."""
        return hashlib.sha256(f"{self.instruction} {self.encoder.digest}".encode()).hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id that may occur."""
        return self.encoder.largest

    def encode_each(self, records: Sequence[Record], locations: Sequence[str]) -> list[list[Encoded]]:
        """Returns the prompt of each record."""
        return self.encoder.encode_each([instruct(record, self.instruction) for record in records], locations)


def instruct(record: Record, instruction: str) -> Record:
    """Returns a problem with an instruction as its system message, or before its text.

    Example:
      >>> instruct(Problem("1 + 1 =", "2"), "Add.").prompt
      'Add.\\n\\n1 + 1 ='
    """
    if not isinstance(record, Problem):
        return record
    if isinstance(record.prompt, str):
        return replace(record, prompt=f"{instruction}\n\n{record.prompt}")
    rest = dropwhile(lambda message: message["role"] == "system", record.prompt)
    return replace(record, prompt=({"role": "system", "content": instruction}, *rest))


class Prompts:
    """Tokenized prompts by the index of their record.

    Args:
      data: The tokens, with one example for each record.

    Attributes:
      length: The number of tokens of the longest prompt.
    """

    def __init__(self, data: Tokenized):
        self._data = data
        self._starts = np.cumsum(data.lengths, dtype=np.int64) - data.lengths
        self._example_of = {owner: number for number, owner in enumerate(data.owners.tolist())}
        self.length = int(data.lengths.max())

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
