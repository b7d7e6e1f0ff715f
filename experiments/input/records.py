"""The kinds of training records, whatever file and format they come from.

Example:
  >>> Conversation(({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})).learn_from
  0
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A `role`, a `content` (text, a list of content parts, or None), and whatever else a chat template reads: `name`,
`tool_calls`, `tool_call_id`, `reasoning_content`, … A `weight` of 0 excludes the message from the loss."""

Tool = dict[str, Any]
"""A function that an assistant can call, as OpenAI describes it: `{"type": "function", "function": {…}}`."""

Prompt = str | tuple[Message, ...]
"""A text, or messages."""


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, of which the assistant's are learned.

    Attributes:
      messages: At least one.
      tools: Passed to the chat template; None where the record has no such column.
      learn_from: Index of the first message that may be learned: of a prompt and a completion that are both messages,
        the completion's first.
      template_arguments: Arguments for the chat template that belong to this record (`chat_template_kwargs`).
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None = None
    learn_from: int = 0
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """A text that continues another one, with nothing put between them; only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """A text of which everything is learned, as in pretraining."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, of which the first is better (DPO and its relatives).

    Attributes:
      prompt: What both answers continue. Empty where two texts have no beginning in common.
      chosen: The better answer, without the prompt; text if the prompt is text, messages if it is messages.
      rejected: The worse answer, likewise.
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
    """A prompt with the answer that a rule compares the model's with, for rewards by rule."""

    prompt: Prompt
    answer: str
    tools: tuple[Tool, ...] | None = None


Record = Conversation | Completion | Text | Preference | Rated | Problem
