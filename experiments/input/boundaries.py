"""Where a prompt ends and an answer begins: a model is prompted with the tokens of the prompt alone.

Tokenized as one text, the end of a prompt and the beginning of an answer may share a token ("is " and "the" the token
" the"), so that a model is trained on other tokens than it is prompted with.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.input.control import ControlTokens, LiteralTokenizer, Span, Tokens
from experiments.input.turns import Example

_ANCHORS = ("\n", "x", ".")  # what is tokenized before a text that does not begin one; one of them merges with nothing


class BoundaryTokenizer:
    """Tokenizes examples, prompts apart from answers.

    Args:
      tokenizer: Of the checkpoint.
      control: Its control tokens.
      together: Whether an example is tokenized as one text all the same. A token across the beginning of an answer is
        then the answer's.
    """

    def __init__(self, tokenizer: LiteralTokenizer, control: ControlTokens, *, together: bool):
        self._tokenizer, self._control, self._together = tokenizer, control, together

    def encode(self, examples: Sequence[Example]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """The (ids, targets) pairs of each example.

        An example with several answers is one pair if all its prompts have the tokens that they have alone; else each
        answer has a pair of its own.
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
        """Where the last control token before each answer begins: tokens before it do not depend on the text behind."""
        positions = [begin for begin, _ in self._control.tokens_in(example.text, example.literal)]
        return [max((one for one in positions if one < begin), default=0) for begin, _ in example.spans]

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
            answer = self._continued(example, start, begin, end)
            yield np.concatenate([prompt, answer]), np.repeat([False, True], [len(prompt), len(answer)])

    def _continued(self, example: Example, start: int, begin: int, end: int) -> np.ndarray:
        """The tokens of an answer, without what tokenizers put before the beginning of a text."""
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
    for begin, end in spans:  # a token that straddles a span's edge belongs to it
        targets |= (begins < end) & ((ends > begin) | (begins >= begin))
    return tokens.ids, targets


def _within(literal: Sequence[Span], begin: int, end: int, position: int = 0) -> list[Span]:
    """The spans of a part of a text, where that part stands at a position of another text."""
    parts = [(max(first, begin), min(last, end)) for first, last in literal if first <= end and last >= begin]
    return [(first - begin + position, last - begin + position) for first, last in parts]
