"""The common formats of training data: detects them by their columns and parses rows as records."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from experiments.errors import UserError
from experiments.input.columns import check_not_empty, mixed_kinds, read_prompt, read_text, turn
from experiments.input.comparisons import (
    NEGATIVES,
    is_label,
    read_anchor,
    read_preference,
    read_problem,
    read_query,
    read_rated,
)
from experiments.input.messages import read_messages, read_tools
from experiments.input.records import (
    Completion,
    Conversation,
    Message,
    Record,
    Text,
)
from experiments.input.strict_json import kind, loads

FormName = Literal[
    "chat",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "text",
    "preference",
    "kto",
    "reward",
    "anchor-positive",
    "query-document",
]


@dataclass(frozen=True)
class Form:
    """A data format.

    Attributes:
      required: Columns that a row of this format has.
      optional: Other columns that are read. The rest is ignored.
      read: Converts a row with the required columns to a record.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str], Record]

    def __str__(self) -> str:
        return ", ".join(self.required) + (f", optionally {', '.join(self.optional)}" if self.optional else "")


def parse(
    row: Any, where: str, form: FormName | None = None, columns: tuple[str, ...] | None = None
) -> tuple[FormName, Record]:
    """Parses a row as a record.

    Args:
      row: An object with columns. Null counts as missing; columns that the format does not have are ignored.
      where: The location of the row, for error messages.
      form: The format; None detects it.
      columns: All columns of the file, for error messages, if the row has only those that a format reads.

    Returns:
      The name of the format, and the record.

    Raises:
      UserError: The row has no known format, or its values are malformed.

    Example:
      >>> parse({"instruction": "Add.", "input": "1 1", "output": "2"}, "x.json, item 1")[1].messages[0]["content"]
      'Add.\\n\\n1 1'
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: got {kind(row)}, expected an object with the columns of a format ({_names()})")
    row = {str(name): value for name, value in row.items() if value is not None}
    if form is None:
        form = _detect(row, where, columns)
    elif missing := [name for name in FORMS[form].required if name not in row]:
        raise UserError(
            f"{where}: missing {' and '.join(missing)}; the format {form} has the columns {FORMS[form]}; got "
            f"{_list_names(columns or row)}"
        )
    return form, FORMS[form].read(row, where)


def _detect(row: Mapping[str, Any], where: str, columns: tuple[str, ...] | None) -> FormName:
    for name in _ORDER:
        if all(column in row for column in FORMS[name].required) and (name != "kto" or is_label(row["label"])):
            return name
    near = max(FORMS, key=lambda name: _likeness(FORMS[name], row))
    raise UserError(
        f"{where}: got {_list_names(columns or row)}, expected the columns of a format ({_names()}); the nearest is "
        f"{near}: {FORMS[near]}"
    )


def _likeness(form: Form, row: Mapping[str, Any]) -> float:
    """Returns the similarity of a row's columns to those that a format requires, from 0 to 1."""
    best = [max((difflib.SequenceMatcher(None, a, b).ratio() for b in row), default=0) for a in form.required]
    return sum(best) / len(best)


def _chat(row: Mapping[str, Any], where: str) -> Conversation:
    return _conversation(row, where, read_messages(row["messages"], where))


def _sharegpt(row: Mapping[str, Any], where: str) -> Conversation:
    messages = read_messages(row["conversations"], where, "conversations")
    return _conversation(row, where, _system(row, where, messages) + messages)


def _alpaca(row: Mapping[str, Any], where: str) -> Conversation:
    instruction, answer = read_text(row, "instruction", where), read_text(row, "output", where)
    context = read_text(row, "input", where) if "input" in row else ""
    history: list[Message] = []
    pairs = row.get("history") or []
    pairs = loads(pairs, f"{where}, history") if isinstance(pairs, str) else pairs
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{where}, history {number}: expected a pair of strings, an instruction and its answer")
        history += [*turn("user", pair[0]), *turn("assistant", pair[1])]
    check_not_empty(answer, "output", where)
    question = "\n\n".join(text for text in (instruction, context) if text.strip())
    if not question:
        raise UserError(f"{where}: both instruction and input are empty")
    messages = (*_system(row, where, ()), *history, *turn("user", question), *turn("assistant", answer))
    return _conversation(row, where, messages)


def _prompt_completion(row: Mapping[str, Any], where: str) -> Conversation | Completion:
    prompt, completion = read_prompt(row, "prompt", where), read_prompt(row, "completion", where)
    if isinstance(prompt, str) and isinstance(completion, str):
        check_not_empty(completion, "completion", where)
        if not any(row.get(name) for name in _RENDERED):
            return Completion(prompt, completion)
        prompt, completion = turn("user", prompt), turn("assistant", completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise mixed_kinds(where, prompt=prompt, completion=completion)
    return _conversation(row, where, (*prompt, *completion), learn_from=len(prompt))


def _only_text(row: Mapping[str, Any], where: str) -> Text:
    text = read_text(row, "text", where)
    check_not_empty(text, "text", where)
    return Text(text)


_RENDERED = ("tools", "functions", "chat_template_kwargs")
FORMS: dict[FormName, Form] = {
    "chat": Form(("messages",), _RENDERED, _chat),
    "sharegpt": Form(("conversations",), ("system", *_RENDERED), _sharegpt),
    "alpaca": Form(("instruction", "output"), ("input", "system", "history", *_RENDERED), _alpaca),
    "prompt-completion": Form(("prompt", "completion"), _RENDERED, _prompt_completion),
    "text": Form(("text",), (), _only_text),
    "preference": Form(("chosen", "rejected"), ("prompt", "tools", "functions"), read_preference),
    "kto": Form(("prompt", "completion", "label"), ("tools", "functions"), read_rated),
    "reward": Form(("prompt", "answer"), ("tools", "functions"), read_problem),
    "anchor-positive": Form(("anchor", "positive"), NEGATIVES, read_anchor),
    "query-document": Form(("query", "document"), NEGATIVES, read_query),
}
_ORDER: tuple[FormName, ...] = (
    *("chat", "sharegpt", "preference", "kto", "prompt-completion", "alpaca", "reward", "anchor-positive"),
    *("query-document", "text"),
)
"""The order of detection, if a row has the columns of several formats."""

COLUMNS = frozenset(name for form in FORMS.values() for name in (*form.required, *form.optional))
"""All columns that some format reads."""


def _conversation(
    row: Mapping[str, Any], where: str, messages: tuple[Message, ...], learn_from: int = 0
) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[learn_from:]):
        raise UserError(f"{where}: none of the {len(messages) - learn_from} messages has the role assistant")
    arguments = row.get("chat_template_kwargs") or {}
    if isinstance(arguments, str):
        arguments = loads(arguments, f"{where}, chat_template_kwargs")
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: chat_template_kwargs is {kind(arguments)}, expected an object")
    return Conversation(messages, read_tools(row, where), learn_from, arguments)


def _system(row: Mapping[str, Any], where: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    text = read_text(row, "system", where) if "system" in row else ""
    if not text.strip():
        return ()
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == text:
            return ()
        raise UserError(f"{where}: the system column and the first message (role system) differ")
    return turn("system", text)


def _list_names(columns: Any) -> str:
    names = [str(name) for name in columns]
    return (", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "nothing"


def _names() -> str:
    return ", ".join(FORMS)
