"""Records to token ids, and which of them are to be learned."""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import UserError, reading
from experiments.input.boundaries import BoundaryTokenizer
from experiments.input.chat import Template, texts_of
from experiments.input.control import ControlTokens, LiteralTokenizer, Span
from experiments.input.records import Completion, Conversation, Record, Text
from experiments.input.template_files import load_template, special_tokens
from experiments.input.turns import Example, Plan, TrainOn, answers, conversation_examples, plan, prompt_call
from experiments.tasks.text import load_tokenizer


class Encoded(NamedTuple):
    """An example.

    Attributes:
      tokens: `int32[n]`, all of its tokens.
      targets: `bool[n]`: which of them are to be learned.
    """

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Options:
    """How records become tokens, where that is a user's choice.

    Attributes:
      template: A chat template in place of the checkpoint's own: a file, or its text.
      template_arguments: Variables for the template, such as `enable_thinking`.
      train_on: What is learned: all of the assistant's answers, the last one, or the whole text.
      control_tokens: Text of a record that spells a control token: it is text, or the token.
      tokenize_together: Whether a prompt and what follows it are tokenized as one text. A token at the boundary may
        then differ from what a model is prompted with.
    """

    template: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    train_on: TrainOn = "answers"
    control_tokens: Literal["text", "parse"] = "text"
    tokenize_together: bool = False


@dataclass(frozen=True)
class Encoder:
    """What turns records into tokens; made by :func:`load_encoder`.

    With a chat template a prompt is a user's message and its completion the assistant's; without one a completion
    follows its prompt as it is, between the tokens that begin and end a text, and conversations are refused.

    Attributes:
      tokenizer: The checkpoint's own, without its post-processor.
      template: Its chat template; None where it has none.
      end: The token that ends a text where there is no template; None teaches no end.
      directory: Of the checkpoint.
      options: A user's choices.
      vocabulary: How many tokens the model has embeddings for; None where that is not known.
      around: The tokens that the checkpoint's tokenizer puts before and behind a text.
      control: Its control tokens.
      notes: What a user should know about the records encoded so far, each with the number of records it concerns.
    """

    tokenizer: Tokenizer
    template: Template | None
    end: int | None
    directory: Path
    options: Options
    vocabulary: int | None
    around: tuple[list[int], list[int]]
    control: ControlTokens
    notes: Counter[str]

    @property
    def digest(self) -> str:
        """Of what decides the tokens."""
        digest = hashlib.sha256((self.directory / "tokenizer.json").read_bytes())
        chat, options = self.template and self.template.identity, dataclasses.asdict(self.options)
        everything = [chat, self.end, options, self.vocabulary, self.control.spellings]
        digest.update(json.dumps(everything, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id that can occur."""
        return max([self.end or 0, *self.around[0], *self.around[1], *self.tokenizer.get_vocab().values()])

    def encode(self, records: Sequence[Record], places: Sequence[str]) -> list[Encoded]:
        """The examples of records, as of :meth:`encode_each`, in one list."""
        return [example for examples in self.encode_each(records, places) for example in examples]

    def encode_each(self, records: Sequence[Record], places: Sequence[str]) -> list[list[Encoded]]:
        """The examples of each record: one; or one for each answer of a conversation, where the template or the
        tokenizer makes another text or other tokens of an earlier turn once others follow; or none, where all answers
        have weight 0.

        Args:
          records: Conversations, completions or texts.
          places: Where each of them stands, for errors.

        Raises:
          UserError: A conversation has no turn of the assistant's, the template refuses it, or there is no template; a
            text is not valid Unicode; the model has no embedding for a token.
        """
        examples, origins = [], []
        for number, parts in enumerate(self._examples(records, places)):
            for example in parts:
                _check_unicode(example.text, places[number])
            examples.extend(parts)
            origins.extend([number] * len(parts))
        encoded: list[list[Encoded]] = [[] for _ in records]
        for example, number, pairs in zip(examples, origins, self._boundaries.encode(examples)):
            for tokens, targets in pairs:
                one = self._document(tokens, targets) if example.document else Encoded(tokens, targets)
                self._check_vocabulary(one.tokens, places[number])
                encoded[number].append(one)
        return encoded

    def encode_prompt(self, record: Record, location: str) -> tuple[np.ndarray, str]:
        """The tokens with which a model is prompted, and what the record has in the place of its answer.

        Args:
          record: A conversation is cut at its last turn of the assistant's, a text in its middle.
          location: Where it stands, for errors.

        Returns:
          `int32[n]`, and the text of that turn, the completion, or the rest of the text.

        Raises:
          UserError: As for :meth:`encode`.
        """
        if isinstance(record, Text) or (self.template is None and isinstance(record, Completion)):
            middle = len(record.text) // 2 if isinstance(record, Text) else len(record.prompt)
            text = record.text if isinstance(record, Text) else record.prompt + record.completion
            prompt, answer, before = text[:middle], text[middle:], self.around[0]
            literal = self._literal(prompt)
        else:
            conversation, template = self._conversation(record, location)
            numbers = answers(conversation, location)
            if not numbers:
                count = len(conversation.messages)
                raise UserError(f"{location}: none of the {count} messages is the assistant's: nothing to answer")
            rendering = template.renderings([prompt_call(conversation, numbers[-1])], location)[0]
            prompt, _, literal = template.require(rendering, location)
            answer, before = "".join(texts_of(conversation.messages[numbers[-1]].get("content"), location)), []
        _check_unicode(prompt, location)
        (tokens,) = self._tokenizer.encode([(prompt, literal)])
        ids = np.concatenate([np.array(before, np.int32), tokens.ids])
        self._check_vocabulary(ids, location)
        return ids, answer

    @functools.cached_property
    def _tokenizer(self) -> LiteralTokenizer:
        return LiteralTokenizer(self.tokenizer, self.control, str(self.directory / "tokenizer.json"))

    @functools.cached_property
    def _boundaries(self) -> BoundaryTokenizer:
        return BoundaryTokenizer(self._tokenizer, self.control, together=self.options.tokenize_together)

    def _examples(self, records: Sequence[Record], places: Sequence[str]) -> list[list[Example]]:
        """The examples of each record."""
        examples: list[list[Example]] = [[] for _ in records]
        plans: dict[int, Plan] = {}
        for number, (record, location) in enumerate(zip(records, places)):
            if (document := self._as_document(record)) is not None:
                examples[number] = [document]
            else:
                conversation, template = self._conversation(record, location)
                plans[number] = plan(template, conversation, location, self.options.train_on)
        for template in (self.template, self.template and self.template.with_tools):
            group = {number: one for number, one in plans.items() if one.template is template}
            if template is not None and group:
                renderings = template.renderings_of([(one.calls, one.location) for one in group.values()])
                for (number, one), texts in zip(group.items(), renderings):
                    notes: set[str] = set()
                    examples[number] = conversation_examples(one, texts, notes)
                    self.notes.update(notes)
        return examples

    def _as_document(self, record: Record) -> Example | None:
        """The example of a record that no template renders."""
        if isinstance(record, Text):
            text, begin = record.text, 0
        elif self.template is None and isinstance(record, Completion):
            text, begin = record.prompt + record.completion, len(record.prompt)
        else:
            return None
        begin = 0 if self.options.train_on == "all" else begin
        return Example(text, [(begin, len(text))], self._literal(text), document=True)

    def _conversation(self, record: Record, location: str) -> tuple[Conversation, Template]:
        """A record as messages, and their template."""
        if isinstance(record, Completion):
            contents = {"user": record.prompt, "assistant": record.completion}
            record = Conversation(tuple({"role": role, "content": text} for role, text in contents.items()))
        if not isinstance(record, Conversation):
            raise UserError(
                f"{location}: a {type(record).__name__.lower()} record; conversations, completions and texts can be "
                "learned from here"
            )
        if self.template is None:
            raise UserError(
                f"{location}: a conversation, but the checkpoint {self.directory} has no chat template "
                "(chat_template.jinja, or chat_template in tokenizer_config.json): it can learn from prompt and "
                "completion, or with another template (--template FILE)"
            )
        with_tools = self.template.with_tools
        return record, with_tools if with_tools is not None and record.tools else self.template

    def _literal(self, text: str) -> list[Span]:
        """A text that no template has rendered is literal, if control tokens in text are."""
        is_text = self.options.control_tokens == "text" and self.control.spelled(text)
        return [(0, len(text))] if is_text else []

    def _document(self, tokens: np.ndarray, targets: np.ndarray) -> Encoded:
        """Tokens between those that begin and end a text."""
        before, behind = (np.array(ids, np.int32) for ids in self.around)
        tokens = np.concatenate([before, tokens, behind])
        targets = np.concatenate([np.zeros(len(before), bool), targets, np.zeros(len(behind), bool)])
        if self.end is not None:
            if not len(tokens) or tokens[-1] != self.end:
                tokens, targets = np.append(tokens, np.int32(self.end)), np.append(targets, True)
            targets[-1] = True
        return Encoded(tokens, targets)

    def _check_vocabulary(self, ids: np.ndarray, location: str) -> None:
        if self.vocabulary is None or not len(ids) or ids.max() < self.vocabulary:
            return
        token = int(ids.max())
        raise UserError(
            f"{location}: the token {self.tokenizer.id_to_token(token)!r} has the id {token}, the model's embedding "
            f"has {self.vocabulary} rows only: {self.directory / 'tokenizer.json'} belongs to another model, or the "
            "model was not resized"
        )


def load_encoder(
    directory: Path, end: int | None, options: Options = Options(), *, vocabulary: int | None = None
) -> Encoder:
    """The encoder of a checkpoint.

    Args:
      directory: In Hugging Face layout.
      end: The token that ends a text where there is no chat template.
      options: A user's choices.
      vocabulary: How many tokens the model has embeddings for.

    Raises:
      UserError: Its tokenizer is missing, or a file cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    named = set(special_tokens(directory).values())
    added = tokenizer.get_added_tokens_decoder()
    control = ControlTokens(
        token.content for number, token in added.items() if token.special or token.content in named or number == end
    )
    template = load_template(
        directory,
        template=options.template,
        arguments=options.template_arguments,
        control=control,
        literal=options.control_tokens == "text",
    )
    with reading(directory / "tokenizer.json", "a tokenizer"):
        around = _around(tokenizer)
    # It is applied here; with it, offsets may leave out the space before a word, which is then nobody's to learn.
    tokenizer.post_processor = None
    return Encoder(tokenizer, template, end, directory, options, vocabulary, around, control, Counter())


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer's post-processor puts before and behind a text."""
    inner, outer = tokenizer.encode("x", add_special_tokens=False).ids, tokenizer.encode("x").ids
    for begin in range(len(outer) - len(inner) + 1):
        if outer[begin : begin + len(inner)] == inner:
            return outer[:begin], outer[begin + len(inner) :]
    return [], []


def _check_unicode(text: str, location: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half, before = f"U+{ord(text[error.start]):04X}", text[max(0, error.start - 20) : error.start]
        raise UserError(
            f"{location}: half of a surrogate pair ({half}) after {before!r}, which is not valid Unicode; a text that "
            "is cut within an emoji has one"
        ) from None
