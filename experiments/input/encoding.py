"""Records to token ids, and which of them are to be learnt."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from experiments.errors import UserError
from experiments.input.chat import Messages, Span, Template, load_template
from experiments.input.records import Completion, Conversation, Record
from experiments.tasks.text import load_tokenizer


class Encoded(NamedTuple):
    """An example.

    Attributes:
      tokens: `int32[n]`, all of its tokens.
      targets: `bool[n]`: which of them are the assistant's, or the completion's.
    """

    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """What turns records into tokens.

    With a chat template a prompt is a user's message and its completion the assistant's; without one a completion
    stands behind its prompt as it is, between the tokens that begin and end a text, and conversations are refused.

    Attributes:
      tokenizer: The checkpoint's own.
      template: Its chat template; None where it has none.
      end: The token that ends a text where there is no template; None teaches no end.
      directory: Of the checkpoint.
    """

    tokenizer: Tokenizer
    template: Template | None
    end: int | None
    directory: Path

    @property
    def digest(self) -> str:
        """Of what decides the tokens."""
        template = self.template
        chat = template and [template.source, template.special_tokens, template.today.isoformat()]
        digest = hashlib.sha256((self.directory / "tokenizer.json").read_bytes())
        digest.update(json.dumps([chat, self.end]).encode())
        return digest.hexdigest()

    def encode(self, records: Sequence[Record], places: Sequence[str]) -> list[Encoded]:
        """The tokens of records.

        Args:
          records: Conversations or completions.
          places: Where each of them stands, for errors.

        Raises:
          UserError: A conversation has no turn of the assistant's, the template refuses it, or there is no template.
        """
        self.tokenizer.no_truncation()
        rendered = [self._render(record, place) for record, place in zip(records, places)]
        encodings = self.tokenizer.encode_batch(
            [text for text, _ in rendered], add_special_tokens=self.template is None
        )
        return [self._encoded(encoding, spans) for encoding, (_, spans) in zip(encodings, rendered)]

    def encode_prompt(self, record: Record, place: str) -> tuple[np.ndarray, str]:
        """The tokens that a model is to go on from, and what the record has in their place.

        Args:
          record: A conversation is cut at its last turn of the assistant's.
          place: Where it stands, for errors.

        Returns:
          `int32[n]`, and the text of that turn or the completion.

        Raises:
          UserError: As for :meth:`encode`.
        """
        self.tokenizer.no_truncation()
        if self.template is None:
            prompt, completion = _plain(record, place, self.directory)
            ids = self.tokenizer.encode(prompt).ids
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.end else ids
        else:
            messages = _messages(record, place)
            turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
            if not turns:
                raise UserError(f"{place}: none of the {len(messages)} messages is the assistant's: nothing to answer")
            completion = messages[turns[-1]]["content"]
            text = self.template.render(messages[: turns[-1]], place, prompt=True)
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.int32), completion.strip()

    def _render(self, record: Record, place: str) -> tuple[str, list[Span]]:
        if self.template is not None:
            return self.template.render_spans(_messages(record, place), place)
        prompt, completion = _plain(record, place, self.directory)
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))]

    def _encoded(self, encoding: Encoding, spans: list[Span]) -> Encoded:
        tokens, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)
        targets = np.zeros(len(tokens), bool)
        begins, ends = offsets.T
        for begin, end in spans:  # a token that straddles a span's edge belongs to it
            targets |= (ends > begin) & (begins < end)
        if self.template is None and self.end is not None:
            if len(tokens) and tokens[-1] == self.end:
                targets[-1] = True
            else:
                tokens, targets = np.append(tokens, np.int32(self.end)), np.append(targets, True)
        return Encoded(tokens, targets)


def load_encoder(directory: Path, end: int | None) -> Encoder:
    """The encoder of a checkpoint.

    Args:
      directory: In Hugging Face layout.
      end: The token that ends a text where there is no chat template.

    Raises:
      UserError: Its tokenizer is missing, or a file cannot be read.
    """
    return Encoder(load_tokenizer(directory), load_template(directory), end, directory)


def _messages(record: Record, place: str) -> Messages:
    if isinstance(record, Conversation):
        if record.tools or record.template_arguments:
            raise UserError(f"{place}: the record has tools or arguments, which chat templates are not given here")
        if any(message.get("weight") == 0 for message in record.messages[record.learn_from :]) or record.learn_from:
            raise UserError(f"{place}: messages of the assistant's that are not to be learnt are not supported here")
        return record.messages
    if not isinstance(record, Completion):
        raise _unsupported(record, place)
    # Space where the two meet belongs to the plain form, in which nothing is put between them.
    return (
        {"role": "user", "content": record.prompt.rstrip()},
        {"role": "assistant", "content": record.completion.lstrip()},
    )


def _plain(record: Record, place: str, directory: Path) -> tuple[str, str]:
    if isinstance(record, Conversation):
        raise UserError(
            f"{place}: a conversation, but the checkpoint {directory} has no chat template (chat_template.jinja, or "
            "chat_template in tokenizer_config.json): it can learn from prompt and completion"
        )
    if not isinstance(record, Completion):
        raise _unsupported(record, place)
    return record.prompt, record.completion


def _unsupported(record: Record, place: str) -> UserError:
    return UserError(f"{place}: a {type(record).__name__.lower()}, expected a conversation or a completion")
