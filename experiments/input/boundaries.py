"""Tokenizes prompts separately from answers, as a model is prompted.

If prompt and answer are tokenized as one text, a token may span their boundary ("is " and "the" share the token
" the"), and the model is trained on other prompt tokens than it sees in generation.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.input.control import ControlTokens, LiteralTokenizer, Span, Tokens
from experiments.input.turns import Example

_ANCHORS = ("\n", "x", ".")  # tokenized before a continuation; at least one of them does not merge with it


class BoundaryTokenizer:
    """Tokenizes the prompts of examples separately from their answers.

    Args:
      tokenizer: The checkpoint's tokenizer.
      control: Its control tokens.
      together: Whether to tokenize an example as one text instead. A token that spans the beginning of an answer is
        then part of the answer.
    """

    def __init__(self, tokenizer: LiteralTokenizer, control: ControlTokens, *, together: bool):
        self._tokenizer, self._control, self._together = tokenizer, control, together

    def encode(self, examples: Sequence[Example]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Returns the (ids, targets) pairs of each example.

        An example with several answers is one pair if all its prompts have the same tokens as when tokenized alone.
        Otherwise each answer is a pair.
        """
        wholes = self._tokenizer.encode([(example.text, example.literal) for example in examples])
        if self._together:
            return [[_targets(whole, example.spans)] for whole, example in zip(wholes, examples)]
        starts = [self._tail_starts(example) for example in examples]
        tails = iter(
            self._tokenizer.encode(
                [
                    (example.text[start:begin], _within(example.literal, start, begin))
                    for example, firsts in zip(examples, starts)
                    for start, (begin, _) in zip(firsts, example.spans)
                ]
            )
        )
        return [
            list(self._pairs(example, whole, [(start, next(tails).ids) for start in firsts]))
            for example, whole, firsts in zip(examples, wholes, starts)
        ]

    def _tail_starts(self, example: Example) -> list[int]:
        """Returns the start of the last control token before each answer; tokens before it ignore later text."""
        positions = [begin for begin, _ in self._control.tokens_in(example.text, example.literal)]
        return [max((position for position in positions if position < begin), default=0) for begin, _ in example.spans]

    def _pairs(
        self, example: Example, whole: Tokens, tails: Sequence[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        prompts = []
        for start, tail in tails:
            count = int(np.searchsorted(whole.offsets[:, 0], start)) if start else 0
            prompts.append(np.concatenate([whole.ids[:count], tail]))
        if all(np.array_equal(prompt, whole.ids[: len(prompt)]) for prompt in prompts):
            yield _targets(whole, example.spans)
            return
        for prompt, (start, _), (begin, end) in zip(prompts, tails, example.spans):
            answer = self._encode_continuation(example, start, begin, end)
            yield np.concatenate([prompt, answer]), np.repeat([False, True], [len(prompt), len(answer)])

    def _encode_continuation(self, example: Example, start: int, begin: int, end: int) -> np.ndarray:
        """Returns the tokens of an answer without the prefix that tokenizers add to the beginning of a text."""
        text, before = example.text[begin:end], example.text[start:begin]
        for anchor in (before,) if before in self._control.spellings else _ANCHORS:
            literal = _within(example.literal, begin, end, len(anchor))
            both, alone = self._tokenizer.encode([(anchor + text, literal), (anchor, [])])
            count = len(alone.ids)
            if np.array_equal(both.ids[:count], alone.ids) and (both.offsets[count:, 0] >= len(anchor)).all():
                return both.ids[count:]
        return self._tokenizer.encode([(text, _within(example.literal, begin, end))])[0].ids


def _targets(tokens: Tokens, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    targets = np.zeros(len(tokens.ids), bool)
    begins, ends = tokens.offsets.T
    for begin, end in spans:  # a token that spans the edge of a span belongs to it
        targets |= (begins < end) & ((ends > begin) | (begins >= begin))
    return tokens.ids, targets


def _within(literal: Sequence[Span], begin: int, end: int, position: int = 0) -> list[Span]:
    """Returns the spans within a part of a text, shifted to that part's position in another text."""
    parts = [(max(first, begin), min(last, end)) for first, last in literal if first <= end and last >= begin]
    return [(first - begin + position, last - begin + position) for first, last in parts]
