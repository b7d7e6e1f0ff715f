"""Converts records to token ids and marks the tokens that the loss covers."""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from experiments.errors import UserError, reading
from experiments.input.boundaries import BoundaryTokenizer
from experiments.input.chat import Template, texts_of
from experiments.input.control import ControlTokens, LiteralTokenizer, Span
from experiments.input.options import Options
from experiments.input.plans import Plan, answers, plan, prompt_call
from experiments.input.records import Completion, Conversation, Record, Text
from experiments.input.template_files import load_template, special_tokens
from experiments.input.turns import Example, conversation_examples
from experiments.pretrained.files import open_files
from experiments.tasks.text import load_tokenizer


class Encoded(NamedTuple):
    """A tokenized example.

    Attributes:
      tokens: `int32[n]`, its tokens.
      targets: `bool[n]`, whether the loss covers a token.
    """

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Converts records to tokens; from :func:`load_encoder`.

    With a chat template, a prompt is a user message and its completion an assistant message. Without one, a completion
    directly follows its prompt, between the tokens that begin and end a text, and conversations are errors.

    Attributes:
      tokenizer: The checkpoint's tokenizer, without its post-processor.
      template: The chat template; None if the checkpoint has none.
      end: The token that ends a text if there is no template; None adds no token.
      directory: The checkpoint.
      options: The user's options.
      vocabulary: Number of tokens for which the model has embeddings; None if unknown.
      around: The tokens that the tokenizer's post-processor adds before and after a text.
      control: The control tokens.
      notes: Notes for the user about the records encoded so far, with the number of records that each concerns.
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
        """A digest of everything that determines the tokens."""
        digest = hashlib.sha256((open_files(self.directory).read("tokenizer.json") or "").encode())
        chat, options = self.template and self.template.identity, dataclasses.asdict(self.options)
        inputs = [chat, self.end, options, self.vocabulary, self.control.spellings, sorted(self.control.ends)]
        digest.update(json.dumps(inputs, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def largest(self) -> int:
        """The largest token id that may occur."""
        return max([self.end or 0, *self.around[0], *self.around[1], *self.tokenizer.get_vocab().values()])

    def encode(self, records: Sequence[Record], locations: Sequence[str]) -> list[Encoded]:
        """Returns the examples of all records; see :meth:`encode_each`."""
        return [example for examples in self.encode_each(records, locations) for example in examples]

    def encode_each(self, records: Sequence[Record], locations: Sequence[str]) -> list[list[Encoded]]:
        """Returns the examples of each record.

        A record has one example. A conversation has one for each answer if the template or the tokenizer represents
        earlier turns differently once others follow, and none if all answers have weight 0.

        Args:
          records: Conversations, completions or texts.
          locations: The location of each record, for error messages.

        Raises:
          UserError: A conversation has no message of the assistant, the template does not accept it, or there is no
            template; a text is not valid Unicode; the model has no embedding for a token.
        """
        examples, origins = [], []
        for number, parts in enumerate(self._examples(records, locations)):
            for example in parts:
                _check_unicode(example.text, locations[number])
            examples.extend(parts)
            origins.extend([number] * len(parts))
        encoded: list[list[Encoded]] = [[] for _ in records]
        for example, number, pairs in zip(examples, origins, self._boundaries.encode(examples)):
            for tokens, targets in pairs:
                result = self._document(tokens, targets) if example.document else Encoded(tokens, targets)
                self._check_vocabulary(result.tokens, locations[number])
                encoded[number].append(result)
        return encoded

    def encode_prompt(self, record: Record, location: str) -> tuple[np.ndarray, str]:
        """Returns the tokens with which a model is prompted for a record, and the record's answer.

        Args:
          record: A conversation, which is split at the last message of the assistant, a completion, or a text, which is
            split in its middle.
          location: Its location, for error messages.

        Returns:
          `int32[n]`, and the text of the message, of the completion, or of the second half.

        Raises:
          UserError: See :meth:`encode_each`.
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
                raise UserError(f"{location}: none of the {count} messages has the role assistant")
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
        return LiteralTokenizer(self.tokenizer, self.control, self._file)

    @functools.cached_property
    def _file(self) -> str:
        return open_files(self.directory).where("tokenizer.json")

    @functools.cached_property
    def _boundaries(self) -> BoundaryTokenizer:
        return BoundaryTokenizer(self._tokenizer, self.control, together=self.options.tokenize_together)

    def _examples(self, records: Sequence[Record], locations: Sequence[str]) -> list[list[Example]]:
        """Returns the examples of each record."""
        examples: list[list[Example]] = [[] for _ in records]
        plans: dict[int, Plan] = {}
        for number, (record, location) in enumerate(zip(records, locations)):
            if (document := self._as_document(record)) is not None:
                examples[number] = [document]
            else:
                conversation, template = self._conversation(record, location)
                plans[number] = plan(template, conversation, location, self.options.train_on)
        for template in (self.template, self.template and self.template.with_tools):
            group = {number: planned for number, planned in plans.items() if planned.template is template}
            if template is not None and group:
                renderings = template.renderings_of([(planned.calls, planned.location) for planned in group.values()])
                for (number, planned), texts in zip(group.items(), renderings):
                    notes: set[str] = set()
                    examples[number] = conversation_examples(planned, texts, notes)
                    self.notes.update(notes)
        return examples

    def _as_document(self, record: Record) -> Example | None:
        """Returns the example of a record that is not rendered with a template, otherwise None."""
        if isinstance(record, Text):
            text, begin = record.text, 0
        elif self.template is None and isinstance(record, Completion):
            text, begin = record.prompt + record.completion, len(record.prompt)
        else:
            return None
        begin = 0 if self.options.train_on == "all" else begin
        return Example(text, [(begin, len(text))], self._literal(text), document=True)

    def _conversation(self, record: Record, location: str) -> tuple[Conversation, Template]:
        """Returns a record as a conversation, and its template."""
        if isinstance(record, Completion):
            contents = {"user": record.prompt, "assistant": record.completion}
            record = Conversation(tuple({"role": role, "content": text} for role, text in contents.items()))
        if not isinstance(record, Conversation):
            raise UserError(
                f"{location}: got a {type(record).__name__.lower()} record, expected a conversation, a completion or a "
                "text"
            )
        if self.template is None:
            raise UserError(
                f"{location}: a conversation needs a chat template, but the checkpoint {self.directory} has none "
                "(chat_template.jinja, or chat_template in tokenizer_config.json); set one with --template FILE, or "
                "use records with prompt and completion"
            )
        with_tools = self.template.with_tools
        return record, with_tools if with_tools is not None and record.tools else self.template

    def _literal(self, text: str) -> list[Span]:
        """Returns the literal spans of a text that is not rendered with a template."""
        is_text = self.options.control_tokens == "text" and self.control.occur_in(text)
        return [(0, len(text))] if is_text else []

    def _document(self, tokens: np.ndarray, targets: np.ndarray) -> Encoded:
        """Adds the tokens that begin and end a text."""
        before, after = (np.array(ids, np.int32) for ids in self.around)
        tokens = np.concatenate([before, tokens, after])
        targets = np.concatenate([np.zeros(len(before), bool), targets, np.zeros(len(after), bool)])
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
            f"{location}: the token {self.tokenizer.id_to_token(token)!r} has the id {token}, but the model's "
            f"embedding has only {self.vocabulary} rows; {self._file} belongs to another model, "
            "or the embedding was not resized"
        )


def load_encoder(
    directory: Path,
    end: int | None,
    options: Options | None = None,
    *,
    ends: Collection[int] = (),
    vocabulary: int | None = None,
) -> Encoder:
    """Loads the encoder of a checkpoint.

    Args:
      directory: A checkpoint in Hugging Face layout.
      end: The token that ends a text if there is no chat template.
      options: The user's options; None uses the defaults.
      ends: The tokens that end a generation. The loss covers an answer up to the first of them.
      vocabulary: Number of tokens for which the model has embeddings.

    Raises:
      UserError: The tokenizer is missing, or a file cannot be read.
    """
    options = options or Options()
    tokenizer = load_tokenizer(directory)
    named = set(special_tokens(directory).values())
    added = tokenizer.get_added_tokens_decoder()
    control = ControlTokens(
        (t.content for number, t in added.items() if t.special or t.content in named or number in {end, *ends}),
        ends=(added[number].content for number in ends if number in added),
    )
    template = load_template(
        directory,
        template=options.template,
        arguments=options.template_arguments,
        control=control,
        literal=options.control_tokens == "text",
    )
    with reading(open_files(directory).where("tokenizer.json"), "a tokenizer"):
        around = _around(tokenizer)
    # _document applies it. With a post-processor, offsets may exclude the space before a word from all tokens.
    tokenizer.post_processor = None
    return Encoder(tokenizer, template, end, directory, options, vocabulary, around, control, Counter())


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens that a tokenizer's post-processor adds before and after a text."""
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
            f"{location}: invalid Unicode, half of a surrogate pair ({half}) after {before!r}; probably a text was cut "
            "within an emoji"
        ) from None
