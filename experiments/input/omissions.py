"""Checks that a chat template renders the text, calls and tools of a conversation."""

import json
import re

from experiments.errors import UserError
from experiments.input.chat import Template, texts_of
from experiments.input.plans import Plan
from experiments.input.records import Message

_REASONING_END = re.compile(r"</[\w:]*think\w*>|\[/THINK\]|<channel\|>")


def check_rendered(template: Template, message: Message, rendered: str, location: str) -> None:
    """Raises a UserError if the rendered text lacks the assistant's text or a call.

    It searches for the last line of the text, because templates trim texts, escape them as JSON and drop reasoning.
    """
    for text in texts_of(message.get("content"), location):
        lines = _REASONING_END.split(text)[-1].strip().splitlines()
        if lines and not _occurs(lines[-1].strip(), rendered):
            raise UserError(
                f"{location}: the chat template of {template.where} omits the assistant's text "
                f"{_quote(lines[-1])}; --template FILE sets another template"
            )
    for name in _calls(message):
        if not _occurs(name, rendered):
            raise UserError(
                f"{location}: the chat template of {template.where} omits the assistant's call of {name}; "
                "--template FILE sets another template"
            )


def note_tools(plan: Plan, text: str, notes: set[str]) -> None:
    """Adds notes if the rendered text lacks calls or tools."""
    selected = () if plan.inverted else plan.selected
    others = [message for number, message in enumerate(plan.record.messages) if number not in selected]
    if any(not _occurs(name, text) for message in others for name in _calls(message)):
        notes.add("the chat template omits tool_calls of messages that are not trained on")
    functions = [tool.get("function", tool) for tool in plan.record.tools or ()]
    if any(not _occurs(str(function.get("name")), text) for function in functions):
        notes.add("the chat template omits the tools")


def _calls(message: Message) -> list[str]:
    """Returns the names of the functions that a message calls."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def _occurs(text: str, rendered: str) -> bool:
    """Whether a text occurs in a rendered text, as it is or escaped as JSON."""
    forms = text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
    return any(form in rendered for form in forms)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]} …")
