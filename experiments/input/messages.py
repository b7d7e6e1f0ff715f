"""Converts the messages, tool calls and tools of data sets to the form that chat templates expect."""

from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError
from experiments.input.records import Message, Tool
from experiments.input.strict_json import kind, loads

_ROLES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "model", "bot", "chatgpt", "bard", "bing"),
    "system": ("system",),
    "tool": ("tool", "observation", "tool_response", "function_response", "function"),
    "tool_calls": ("function_call", "tool_call"),
}
_ROLE_OF_SPEAKER = {speaker: role for role, speakers in _ROLES.items() for speaker in speakers}


def read_messages(value: Any, where: str, name: str = "messages") -> tuple[Message, ...]:
    """Reads messages in OpenAI's or ShareGPT's form.

    Every returned message has `role` and `content`. Null values are dropped. An older `function_call` and ShareGPT's
    calls become `tool_calls`, whose arguments are objects.

    Args:
      value: A list of messages, or a JSON string of one.
      where: The location of the record, for error messages.
      name: The column, for error messages.

    Raises:
      UserError: A message is malformed.
    """
    value = _from_json(value, where, name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} is {kind(value)}, expected a list with at least one message")
    return tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1))


def read_tools(row: Mapping[str, Any], where: str) -> tuple[Tool, ...] | None:
    """Reads a record's `tools`, or the older `functions`: a list, or a JSON string of one.

    Raises:
      UserError: A tool is malformed, or the record has both columns.
    """
    columns = {}
    for name in ("tools", "functions"):
        value = row.get(name)
        value = _from_json(value, where, name) if isinstance(value, str) and value.strip() else value
        if value:
            columns[name] = value
    if len(columns) > 1:
        raise UserError(f"{where}: both tools and functions (the older name of tools); expected only one of them")
    for name, value in columns.items():
        if not isinstance(value, list):
            raise UserError(f"{where}: {name} is {kind(value)}, expected a list of tools")
        return tuple(_tool(tool, f"{where}, {name}, item {number}") for number, tool in enumerate(value, start=1))
    return None


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: got {kind(value)}, expected an object with role and content")
    message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str) or not message["role"]:
        what = kind(value["role"]) if "role" in value else "missing"
        raise UserError(f"{where}: role is {what}, expected a string")
    if message["role"] == "function":
        message["role"] = "tool"
    _normalize_calls(message, where)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1)]
    elif not isinstance(content, str) and not (content is None and "tool_calls" in message):
        what = kind(value["content"]) if "content" in value else "missing"
        raise UserError(f"{where}: content is {what}, expected a string or text parts")
    weight = message.get("weight", 1)
    if isinstance(weight, str | bool) or weight not in (0, 1):
        raise UserError(f"{where}: weight is {weight!r}, expected 0 (not learned) or 1")
    return {"role": message["role"], "content": content, **message}


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, text = message.pop("from"), message.pop("value", message.pop("content", None))
    role = _ROLE_OF_SPEAKER.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where}: from is {speaker!r}, expected one of {', '.join(_ROLE_OF_SPEAKER)}")
    if role != "tool_calls":
        if not isinstance(text, str):
            raise UserError(f"{where}: value is {kind(text)}, expected a string")
        return {"role": role, "content": text, **message}
    calls = _from_json(text, where, "value")
    return {"role": "assistant", **message, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _part(value: Any, where: str) -> dict[str, Any]:
    part = {"type": "text", "text": value} if isinstance(value, str) else value
    if not isinstance(part, Mapping):
        raise UserError(f"{where}: got {kind(part)}, expected an object with type and text")
    if part.get("type", "text") != "text":
        raise UserError(f"{where}: type is {part['type']!r}, expected 'text'; other content is not supported")
    if not isinstance(part.get("text"), str):
        raise UserError(f"{where}: text is {kind(part.get('text'))}, expected a string")
    return {"type": "text", **{key: item for key, item in part.items() if item is not None}}


def _normalize_calls(message: Message, where: str) -> None:
    """Converts calls to the current form; an older `function_call` is appended to `tool_calls`."""
    calls = _from_json(message.pop("tool_calls", None) or [], where, "tool_calls")
    if "function_call" in message:
        calls = [*calls, message.pop("function_call")]
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls is {kind(calls)}, expected a list")
    if calls:
        message["tool_calls"] = [_call(call, f"{where}, call {number}") for number, call in enumerate(calls, start=1)]


def _call(value: Any, where: str) -> dict[str, Any]:
    call = _from_json(value, where, "the call")
    if isinstance(call, Mapping) and "function" not in call and "name" in call:
        call = {"function": {key: item for key, item in call.items() if key != "type"}}
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise UserError(f"{where}: got {kind(call)}, expected an object with a function: its name and arguments")
    function = dict(call["function"])
    if not isinstance(function.get("name"), str):
        raise UserError(f"{where}: the function's name is {kind(function.get('name'))}, expected a string")
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's form; templates render objects
        arguments = loads(arguments, f"{where}, arguments") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise UserError(f"{where}: arguments is {kind(arguments)}, expected an object or a JSON string of one")
    others = {key: item for key, item in call.items() if item is not None}
    return {"type": "function", **others, "function": {**function, "arguments": dict(arguments or {})}}


def _tool(value: Any, where: str) -> Tool:
    tool = _from_json(value, where, "the tool")
    if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
        tool = {"function": {key: item for key, item in tool.items() if key != "type"}}
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        raise UserError(f"{where}: got {kind(tool)}, expected an object with a function: its name and parameters")
    if not isinstance(tool["function"].get("name"), str):
        raise UserError(f"{where}: the function's name is {kind(tool['function'].get('name'))}, expected a string")
    return {"type": "function", **tool}


def _from_json(value: Any, where: str, name: str) -> Any:
    """Decodes a JSON string, as which tables store nested values; returns other values unchanged."""
    return loads(value, f"{where}, {name}") if isinstance(value, str) else value
