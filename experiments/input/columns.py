"""Reads the values of a row's columns; errors name the row, the column and what was expected."""

from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError
from experiments.input.messages import read_messages
from experiments.input.records import Message, Prompt
from experiments.input.strict_json import kind


def turn(role: str, content: str) -> tuple[Message, ...]:
    """Returns a conversation of one message."""
    return ({"role": role, "content": content},)


def read_prompt(row: Mapping[str, Any], name: str, where: str) -> Prompt:
    """Reads text or messages."""
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} is {kind(value)}, expected a string or a list of messages")
    return read_messages(value, where, name)


def read_text(row: Mapping[str, Any], name: str, where: str) -> str:
    """Reads a text."""
    if not isinstance(row[name], str):
        raise UserError(f"{where}: {name} is {kind(row[name])}, expected a string")
    return row[name]


def check_not_empty(text: str, name: str, where: str, expected: str = "text to train on") -> None:
    """Raises a UserError if a text is empty."""
    if not text.strip():
        raise UserError(f"{where}: {name} is empty; expected {expected}")


def mixed_kinds(where: str, **values: Prompt) -> UserError:
    """Returns the error of columns of which some are text and some are messages."""
    what = " and ".join(f"{name} is {'text' if isinstance(v, str) else 'messages'}" for name, v in values.items())
    return UserError(f"{where}: {what}; expected both as text or both as messages")
