"""The types of training records, independent of file and format.

Example:
  >>> Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})).learn_from
  0
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A dict with `role`, `content` (text, a list of content parts, or None) and other keys that chat templates read, such
as `name`, `tool_calls`, `tool_call_id` and `reasoning_content`. A `weight` of 0 excludes the message from the loss."""

Tool = dict[str, Any]
"""A function that the assistant can call, in OpenAI's format: `{"type": "function", "function": {…}}`."""

Prompt = str | tuple[Message, ...]
"""Text or messages."""


@dataclass(frozen=True)
class Conversation:
    """A sequence of messages; the loss covers those of the assistant.

    Attributes:
      messages: At least one.
      tools: Arguments for the chat template; None if the record has no such column.
      learn_from: Index of the first message that the loss may cover. If prompt and completion are both messages, this
        is the completion's first.
      template_arguments: This record's variables for the chat template (`chat_template_kwargs`).
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None = None
    learn_from: int = 0
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """A text that directly continues a prompt; the loss covers only the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text that the loss covers completely, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Preference:
    """A better and a worse answer to a prompt (for DPO and related losses).

    Attributes:
      prompt: The prompt of both answers. Empty if two texts have no common prefix.
      chosen: The better answer without the prompt, text or messages like the prompt.
      rejected: The worse answer, in the same form.
      tools: As in :class:`Conversation`.
    """

    prompt: Prompt
    chosen: Prompt
    rejected: Prompt
    tools: tuple[Tool, ...] | None = None


@dataclass(frozen=True)
class Rated:
    """An answer with a thumbs-up (True) or thumbs-down (KTO)."""

    prompt: Prompt
    completion: Prompt
    label: bool
    tools: tuple[Tool, ...] | None = None


@dataclass(frozen=True)
class Problem:
    """A prompt and its reference answer, with which a rule-based reward compares the model's."""

    prompt: Prompt
    answer: str
    tools: tuple[Tool, ...] | None = None


@dataclass(frozen=True)
class TextPair:
    """A text and another that belongs to it, such as a query and its document, for embeddings.

    Attributes:
      anchor: The first text.
      positive: The text that belongs to it.
      negatives: Texts that do not, besides those of other records.
    """

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


Record = Conversation | Completion | Text | Preference | Rated | Problem | TextPair
