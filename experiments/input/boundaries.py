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
        cuts = [(example, begin) for example in examples for begin, _ in example.spans]
        prompts = iter(self._tokenizer.encode([(one.text[:begin], _before(one.literal, begin)) for one, begin in cuts]))
        return [list(self._pairs(example, whole, prompts)) for example, whole in zip(examples, wholes)]

    def _pairs(
        self, example: Example, whole: Tokens, prompts: Iterator[Tokens]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        own = [next(prompts).ids for _ in example.spans]
        if all(np.array_equal(ids, whole.ids[: len(ids)]) for ids in own):
            yield _targets(whole, example.spans)
            return
        for ids, (begin, end) in zip(own, example.spans):
            answer = self._continued(example, begin, end)
            yield np.concatenate([ids, answer]), np.repeat([False, True], [len(ids), len(answer)])

    def _continued(self, example: Example, begin: int, end: int) -> np.ndarray:
        """The tokens of a part of a text, without what tokenizers put before the beginning of a text."""
        tokens = self._control.tokens_in(example.text[:begin], _before(example.literal, begin))
        last = example.text[slice(*tokens[-1])] if tokens and tokens[-1][1] == begin else None
        text = example.text[begin:end]
        for anchor in (last,) if last else _ANCHORS:
            literal = _within(example.literal, begin, end, len(anchor))
            both, alone = self._tokenizer.encode([(anchor + text, literal), (anchor, [])])
            count = len(alone.ids)
            if np.array_equal(both.ids[:count], alone.ids) and (both.offsets[count:, 0] >= len(anchor)).all():
                return both.ids[count:]
        return self._tokenizer.encode([(text, _within(example.literal, begin, end, 0))])[0].ids


def _targets(tokens: Tokens, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    targets = np.zeros(len(tokens.ids), bool)
    begins, ends = tokens.offsets.T
    for begin, end in spans:  # a token that straddles a span's edge belongs to it
        targets |= (begins < end) & ((ends > begin) | (begins >= begin))
    return tokens.ids, targets


def _before(literal: Sequence[Span], end: int) -> list[Span]:
    return _within(literal, 0, end, 0)


def _within(literal: Sequence[Span], begin: int, end: int, position: int) -> list[Span]:
    """The spans of a part of a text, where that part stands at a position of another text."""
    parts = [(max(first, begin), min(last, end)) for first, last in literal if first <= end and last >= begin]
    return [(first - begin + position, last - begin + position) for first, last in parts]
