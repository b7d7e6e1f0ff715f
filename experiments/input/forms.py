"""Rows of data files as records."""

from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError
from experiments.input.records import Completion, Conversation, Record

FORMS = '{"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "completion": …}'


def parse(found: Any, place: str) -> Record:
    """A record in one of its two forms; columns that have no part in it are ignored.

    Args:
      found: What was read.
      place: Where that stands, for errors.

    Raises:
      UserError: It is in neither form.
    """
    if not isinstance(found, Mapping):
        raise UserError(f"{place}: found {_kind(found)}, expected {FORMS}")
    if found.get("tools"):
        raise UserError(f"{place}: the record has tools, which chat templates are not given here")
    if found.get("messages") is not None:
        return Conversation(_messages(found["messages"], place))
    if "prompt" not in found or "completion" not in found:
        columns = ", ".join(map(str, found)) or "nothing"
        raise UserError(f"{place}: found {columns}, expected {FORMS}")
    for name in ("prompt", "completion"):
        if not isinstance(found[name], str):
            raise UserError(f"{place}: {name} is {_kind(found[name])}, expected a string")
    if not found["completion"].strip():
        raise UserError(f"{place}: the completion is empty, there is nothing to learn")
    return Completion(found["prompt"], found["completion"])


def _messages(found: Any, place: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(found, list) or not found:
        raise UserError(f"{place}: messages is {_kind(found)}, expected a list with at least one message")
    messages = []
    for number, message in enumerate(found, start=1):
        here = f"{place}, message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{here}: found {_kind(message)}, expected an object with role and content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                what = _kind(message[name]) if name in message else "missing"
                raise UserError(f"{here}: {name} is {what}, expected a string")
        # A table has every column in every message; a template asks whether one is there.
        messages.append({name: value for name, value in message.items() if value is not None})
    return tuple(messages)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, list | str) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
