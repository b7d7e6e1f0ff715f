"""The user's options for converting records to tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

TrainOn = Literal["answers", "last", "all"]
"""The text that the loss covers: all answers of the assistant, the last one, or the whole text."""


@dataclass(frozen=True)
class Options:
    """Options for converting records to tokens.

    Attributes:
      template: A chat template to use instead of the checkpoint's: a file, Jinja source, or a name.
      template_arguments: Variables for the template, such as `enable_thinking`.
      train_on: The text that the loss covers: all answers of the assistant, the last one, or the whole text.
      control_tokens: Whether text in a record that spells a control token is plain text or the token.
      tokenize_together: Whether to tokenize prompt and answer as one text. A token at their boundary may then differ
        from the tokens with which a model is prompted.
    """

    template: str | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    train_on: TrainOn = "answers"
    control_tokens: Literal["text", "parse"] = "text"
    tokenize_together: bool = False


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Parses template arguments from a command line: JSON objects or NAME=VALUE.

    Raises:
      ValueError: An argument is neither.

    Example:
      >>> parse_arguments(['{"enable_thinking": false}', "date_string=1 May 2025", "level=2"])
      {'enable_thinking': False, 'date_string': '1 May 2025', 'level': 2}
    """
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            arguments[name] = _value(value)
        elif isinstance(parsed := _value(text), dict):
            arguments |= parsed
        else:
            raise ValueError(f"--template-arguments: expected a JSON object or NAME=VALUE, got {text!r}")
    return arguments


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
