"""Control tokens in the text of messages: text that spells one is text, unless a user wants it otherwise.

A template is given messages in which such spellings stand between marks, characters that neither the messages nor the
template hold. They show in what it renders which spellings are the template's own. The tokens of a text of which some
spellings are control tokens and others are not come from a copy of the tokenizer, in which control tokens have names
that no text can hold.
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
"""Characters of a text, from the first to behind the last."""

_MARKS = range(0x20000, 0x2A6D0)  # ideographs: filters that escape what cannot be printed leave them as they are


class Marks(NamedTuple):
    """Characters for marks in a text that holds none of them.

    Attributes:
      begin: Before what a `{% generation %}` block renders.
      end: Behind it.
      literal: Before text that is no control token, whatever it spells.
      literal_end: Behind it.
    """

    begin: str
    end: str
    literal: str
    literal_end: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> "Marks":
        """Marks that none of the texts holds."""
        text = "\0".join(texts)
        while True:
            marks = cls(*map(chr, random.sample(_MARKS, 4)))
            if not any(mark in text for mark in marks):
                return marks


class Marked(NamedTuple):
    """A text without its marks.

    Attributes:
      text: Whole.
      blocks: What `{% generation %}` blocks rendered.
      literal: Text that is no control token, whatever it spells. An empty span at a position says that no control
        token lies across it.
    """

    text: str
    blocks: list[Span]
    literal: list[Span]

    @classmethod
    def from_text(cls, text: str, marks: Marks) -> "Marked":
        """Reads the marks of a text.

        Raises:
          ValueError: A `{% generation %}` block stands in another one, or has lost one of its ends.
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
                raise ValueError("a {% generation %} block stands in another one")
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
            raise ValueError("a {% generation %} block has lost its end")
        return cls("".join(parts), blocks, literal + ([] if quoted is None else [(quoted, quoted)]))


class ControlTokens:
    """The spellings that a tokenizer reads as control tokens.

    Args:
      spellings: Of the tokens. None of them: no text is marked, and all that spells a token is that token.

    Example:
      >>> control = ControlTokens(["<|end|>"])
      >>> marks = Marks("(", ")", "[", "]")
      >>> control.marked({"role": "user", "content": "what does <|end|> do? <|"}, marks)
      {'role': 'user', 'content': 'what does [<|end|>] do? <|[]'}
      >>> control.tokens_in("what does <|end|> do?<|end|>", [(10, 17)])
      [(21, 28)]
    """

    def __init__(self, spellings: Iterable[str]):
        self.spellings = sorted({spelling for spelling in spellings if spelling}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.spellings)) or r"(?!)")
        self._longest = max(map(len, self.spellings), default=0)
        # A text that ends in one of these may make a control token with the text behind it; and the other way round.
        self._firsts = {spelling[:size] for spelling in self.spellings for size in range(1, len(spelling))}
        self._lasts = {spelling[size:] for spelling in self.spellings for size in range(1, len(spelling))}

    def spelled(self, text: str) -> bool:
        """Whether a text spells a control token."""
        return self._pattern.search(text) is not None

    def marked(self, value: Any, marks: Marks) -> Any:
        """A copy of JSON's data in which marks stand around what spells a control token, or may do so with its
        surroundings."""
        if isinstance(value, str):
            text = self._pattern.sub(rf"{marks.literal}\g<0>{marks.literal_end}", value)
            sizes = range(1, min(self._longest, len(value) + 1))
            if any(value[:size] in self._lasts for size in sizes):
                text = f"{marks.literal}{marks.literal_end}{text}"
            if any(value[-size:] in self._firsts for size in sizes):
                text = f"{text}{marks.literal}{marks.literal_end}"
            return text
        if isinstance(value, Mapping):
            return {self.marked(name, marks): self.marked(one, marks) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.marked(one, marks) for one in value]
        return value

    def tokens_in(self, text: str, literal: Sequence[Span]) -> list[Span]:
        """Where a text has control tokens, but for what is literal."""
        spans, position = [], 0
        while match := self._pattern.search(text, position):
            begin, end = match.span()
            position = begin + 1
            if not any(first < end and last > begin for first, last in literal):
                spans.append((begin, end))
                position = end
        return spans


def strings(value: Any) -> Iterator[str]:
    """All texts in JSON's data, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from strings(name)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)


class Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
      ids: `int32[n]`.
      offsets: `int32[n, 2]`, the characters that each token stands for.
    """

    ids: np.ndarray
    offsets: np.ndarray


class LiteralTokenizer:
    """A tokenizer that can be told which text is no control token.

    Args:
      tokenizer: Without a post-processor.
      control: Its control tokens.
      where: The file it is from, for errors.
    """

    def __init__(self, tokenizer: Tokenizer, control: ControlTokens, where: str):
        self._tokenizer, self._control, self._where = tokenizer, control, where

    def encode(self, texts: Sequence[tuple[str, Sequence[Span]]]) -> list[Tokens]:
        """The tokens of texts.

        Args:
          texts: Each with the spans of it that are literal.

        Raises:
          UserError: The tokenizer fails: its file is damaged.
        """
        with reading(self._where, "a tokenizer"):
            encodings = iter(self._tokenizer.encode_batch([text for text, literal in texts if not literal]))
            return [self._literal(text, literal) if literal else _tokens(next(encodings)) for text, literal in texts]

    def _literal(self, text: str, literal: Sequence[Span]) -> Tokens:
        tokenizer, names = self._renamed
        parts, position, length = [], 0, 0
        before, behind = [0], [0]  # positions that correspond, in the text and in the one with other names
        for begin, end in self._control.tokens_in(text, literal):
            name = names[text[begin:end]]
            parts += [text[position:begin], name]
            length += begin - position
            before += [begin, end]
            behind += [length, length + len(name)]
            position, length = end, length + len(name)
        parts.append(text[position:])
        tokens = _tokens(tokenizer.encode("".join(parts)))
        before, behind = [*before, len(text)], [*behind, length + len(text) - position]
        return Tokens(tokens.ids, np.interp(tokens.offsets, behind, before).astype(np.int32))

    @functools.cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """A copy of the tokenizer whose control tokens have other names, and these by the token's own."""
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
                    f"{self._where}: the tokenizer cannot keep {spelling!r} in a message's text apart from its control "
                    "token; --control-tokens parse reads it as the token"
                )
        return renamed, names


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2))
