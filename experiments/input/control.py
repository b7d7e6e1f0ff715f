"""Distinguishes control tokens from text in messages that spells one.

Messages are rendered with marks around such text; the marks are characters that occur neither in the messages nor in
the template. In the rendered text, spellings without marks are the template's control tokens. A text that contains both
is tokenized with a copy of the tokenizer in which control tokens have names that do not occur in any text.
"""

import functools
import json
import random
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from experiments.errors import UserError, reading

Span = tuple[int, int]
"""A range of characters in a text: begin (included) and end (excluded)."""

_MARKS = range(0x20000, 0x2A6D0)  # ideographs: printable, so that filters do not escape them


class Marks(NamedTuple):
    """Characters that mark parts of a text.

    Attributes:
      begin: Begins the text of a `{% generation %}` block.
      end: Ends it.
      literal: Begins literal text, which contains no control tokens.
      literal_end: Ends it.
    """

    begin: str
    end: str
    literal: str
    literal_end: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> "Marks":
        """Returns marks that do not occur in the texts."""
        text = "\0".join(texts)
        while True:
            marks = cls(*map(chr, random.sample(_MARKS, 4)))
            if not any(mark in text for mark in marks):
                return marks


class Marked(NamedTuple):
    """A text without its marks.

    Attributes:
      text: The whole text.
      blocks: The text of `{% generation %}` blocks.
      literal: Literal text, which contains no control tokens. No control token spans the position of an empty span.
    """

    text: str
    blocks: list[Span]
    literal: list[Span]

    @classmethod
    def from_text(cls, text: str, marks: Marks) -> "Marked":
        """Parses the marks of a text.

        Raises:
          ValueError: `{% generation %}` blocks are nested, or a block has no end.
        """
        if not any(mark in text for mark in marks):
            return cls(text, [], [])
        parts, blocks, literal, length = [], [], [], 0
        block = quoted = None
        for part in re.split(f"([{''.join(marks)}])", text):
            if part == marks.begin and block is None:
                block = length
            elif part == marks.end and block is not None:
                blocks += [(block, length)] if length > block else []
                block = None
            elif part in (marks.begin, marks.end):
                raise ValueError("{% generation %} blocks are nested")
            elif part == marks.literal:
                literal += [] if quoted is None else [(quoted, quoted)]
                quoted = length
            elif part == marks.literal_end:
                literal.append((length if quoted is None else quoted, length))
                quoted = None
            else:
                parts.append(part)
                length += len(part)
        if block is not None:
            raise ValueError("a {% generation %} block has no end")
        return cls("".join(parts), blocks, literal + ([] if quoted is None else [(quoted, quoted)]))


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
      spellings: The text of each token. If empty, no text is marked.
      ends: The text of the tokens that end a generation.

    Example:
      >>> control = ControlTokens(["<|end|>"])
      >>> marks = Marks("(", ")", "[", "]")
      >>> control.mark({"role": "user", "content": "what does <|end|> do? <|"}, marks)
      {'role': 'user', 'content': 'what does [<|end|>] do? <|[]'}
      >>> control.tokens_in("what does <|end|> do?<|end|>", [(10, 17)])
      [(21, 28)]
    """

    def __init__(self, spellings: Iterable[str], ends: Iterable[str] = ()):
        self.ends = frozenset(ends)
        # Longer ones first, and an order that is the same in every process: digests depend on it.
        self.spellings = sorted({spelling for spelling in spellings if spelling}, key=lambda text: (-len(text), text))
        self._pattern = re.compile("|".join(map(re.escape, self.spellings)) or r"(?!)")
        self._longest = max(map(len, self.spellings), default=0)
        # A text that ends with one of these may form a control token with the text after it, and vice versa.
        self._prefixes = {spelling[:size] for spelling in self.spellings for size in range(1, len(spelling))}
        self._suffixes = {spelling[size:] for spelling in self.spellings for size in range(1, len(spelling))}

    def occur_in(self, text: str) -> bool:
        """Whether a text contains the spelling of a control token."""
        return self._pattern.search(text) is not None

    def mark(self, value: Any, marks: Marks) -> Any:
        """Returns a copy of JSON data with marks around text that spells a control token, by itself or together with
        the text around it."""
        if isinstance(value, str):
            text = self._pattern.sub(rf"{marks.literal}\g<0>{marks.literal_end}", value)
            sizes = range(1, min(self._longest, len(value) + 1))
            if any(value[:size] in self._suffixes for size in sizes):
                text = f"{marks.literal}{marks.literal_end}{text}"
            if any(value[-size:] in self._prefixes for size in sizes):
                text = f"{text}{marks.literal}{marks.literal_end}"
            return text
        if isinstance(value, Mapping):
            return {self.mark(name, marks): self.mark(item, marks) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def tokens_in(self, text: str, literal: Sequence[Span]) -> list[Span]:
        """Returns the control tokens in a text, except in literal spans."""
        spans, position = [], 0
        while match := self._pattern.search(text, position):
            begin, end = match.span()
            position = begin + 1
            if not any(first < end and last > begin for first, last in literal):
                spans.append((begin, end))
                position = end
        return spans


def strings(value: Any) -> Iterator[str]:
    """Yields all strings in JSON data, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from strings(name)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


class Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
      ids: `int32[n]`.
      offsets: `int32[n, 2]`, the span of each token.
    """

    ids: np.ndarray
    offsets: np.ndarray


class LiteralTokenizer:
    """A tokenizer for texts with literal spans, which contain no control tokens.

    Args:
      tokenizer: A tokenizer without post-processor.
      control: Its control tokens.
      where: Its file, for error messages.
    """

    def __init__(self, tokenizer: Tokenizer, control: ControlTokens, where: str):
        self._tokenizer, self._control, self._where = tokenizer, control, where

    def encode(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[Tokens]:
        """Tokenizes texts.

        Args:
          texts: Pairs of a text and its literal spans.

        Raises:
          UserError: The tokenizer fails because its file is damaged.
        """
        with reading(self._where, "a tokenizer"):
            encodings = iter(self._tokenizer.encode_batch([text for text, literal in texts if not literal]))
            return [
                self._encode_literal(text, literal) if literal else _tokens(next(encodings)) for text, literal in texts
            ]

    def _encode_literal(self, text: str, literal: Sequence[Span]) -> Tokens:
        tokenizer, names = self._renamed
        parts, position, length = [], 0, 0
        positions, renamed_positions = [0], [0]  # corresponding positions in the text and in the renamed text
        for begin, end in self._control.tokens_in(text, literal):
            name = names[text[begin:end]]
            parts += [text[position:begin], name]
            length += begin - position
            positions += [begin, end]
            renamed_positions += [length, length + len(name)]
            position, length = end, length + len(name)
        parts.append(text[position:])
        tokens = _tokens(tokenizer.encode("".join(parts)))
        positions.append(len(text))
        renamed_positions.append(length + len(text) - position)
        return Tokens(tokens.ids, np.interp(tokens.offsets, renamed_positions, positions).astype(np.int32))

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """A copy of the tokenizer with renamed control tokens, and the new names by spelling."""
        nonce = "".join(chr(secrets.choice(_MARKS)) for _ in range(8))
        names = {spelling: f"{nonce}{number}." for number, spelling in enumerate(self._control.spellings)}
        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = content["model"]
        if isinstance(vocabulary := model["vocab"], dict):
            model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        renamed = Tokenizer.from_str(json.dumps(content))
        for spelling, name in names.items():
            if renamed.token_to_id(name) != self._tokenizer.token_to_id(spelling):
                raise UserError(
                    f"{self._where}: the tokenizer cannot distinguish {spelling!r} in a message's text from the "
                    "control token; --control-tokens parse reads it as the token"
                )
        return renamed, names


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
