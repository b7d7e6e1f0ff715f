"""The common formats of training data: detects them by their columns and parses rows as records."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from experiments.errors import UserError
from experiments.input.messages import read_messages, read_tools
from experiments.input.records import (
    Completion,
    Conversation,
    Message,
    Preference,
    Problem,
    Prompt,
    Rated,
    Record,
    Text,
)
from experiments.input.strict_json import kind, loads

FormName = Literal["chat", "sharegpt", "alpaca", "prompt-completion", "text", "preference", "kto", "reward"]
_LABELS = {
    True: True,
    False: False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}  # True == 1, False == 0


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
        if all(column in row for column in FORMS[name].required) and (name != "kto" or _is_label(row["label"])):
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
    instruction, answer = _text(row, "instruction", where), _text(row, "output", where)
    context = _text(row, "input", where) if "input" in row else ""
    history: list[Message] = []
    pairs = row.get("history") or []
    pairs = loads(pairs, f"{where}, history") if isinstance(pairs, str) else pairs
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [pairs], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{where}, history {number}: expected a pair of strings, an instruction and its answer")
        history += [*_turn("user", pair[0]), *_turn("assistant", pair[1])]
    _not_empty(answer, "output", where)
    question = "\n\n".join(text for text in (instruction, context) if text.strip())
    if not question:
        raise UserError(f"{where}: both instruction and input are empty")
    messages = (*_system(row, where, ()), *history, *_turn("user", question), *_turn("assistant", answer))
    return _conversation(row, where, messages)


def _prompt_completion(row: Mapping[str, Any], where: str) -> Conversation | Completion:
    prompt, completion = _prompt(row, "prompt", where), _prompt(row, "completion", where)
    if isinstance(prompt, str) and isinstance(completion, str):
        _not_empty(completion, "completion", where)
        if not any(row.get(name) for name in _RENDERED):
            return Completion(prompt, completion)
        prompt, completion = _turn("user", prompt), _turn("assistant", completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise _mixed(where, prompt=prompt, completion=completion)
    return _conversation(row, where, (*prompt, *completion), learn_from=len(prompt))


def _only_text(row: Mapping[str, Any], where: str) -> Text:
    text = _text(row, "text", where)
    _not_empty(text, "text", where)
    return Text(text)


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    chosen, rejected = _prompt(row, "chosen", where), _prompt(row, "rejected", where)
    prompt = _prompt(row, "prompt", where) if "prompt" in row else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _mixed(where, chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise UserError(f"{where}: chosen and rejected are the same")
    tools = read_tools(row, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is None:
            prompt = _shared_text(str(chosen), str(rejected))
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        elif not isinstance(prompt, str):
            raise _mixed(where, prompt=prompt, chosen=chosen)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            _not_empty(str(text), name, where)
        return Preference(prompt, chosen, rejected, tools)
    if isinstance(prompt, str):  # if the answers are whole conversations, it is the text of their first message
        prompt = _turn("user", prompt) if chosen[0]["role"] == "assistant" else None
    if prompt is None:
        prompt = _shared_messages(chosen, rejected)
        if not prompt:
            raise UserError(f"{where}: chosen and rejected start with different messages; expected a prompt")
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        raise UserError(f"{where}: {'rejected' if chosen else 'chosen'} has no message after the prompt")
    return Preference(prompt, chosen, rejected, tools)


def _rated(row: Mapping[str, Any], where: str) -> Rated:
    prompt, completion = _prompt(row, "prompt", where), _prompt(row, "completion", where)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise _mixed(where, prompt=prompt, completion=completion)
    if not _is_label(row["label"]):
        raise UserError(f"{where}: label is {kind(row['label'])}, expected true (good) or false (bad)")
    if isinstance(completion, str):
        _not_empty(completion, "completion", where)
    label = row["label"]
    return Rated(
        prompt, completion, _LABELS[label.lower() if isinstance(label, str) else label], read_tools(row, where)
    )


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    answer = row["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise UserError(f"{where}: answer is {kind(answer)}, expected a string")
    return Problem(_prompt(row, "prompt", where), answer, read_tools(row, where))


_RENDERED = ("tools", "functions", "chat_template_kwargs")
FORMS: dict[FormName, Form] = {
    "chat": Form(("messages",), _RENDERED, _chat),
    "sharegpt": Form(("conversations",), ("system", *_RENDERED), _sharegpt),
    "alpaca": Form(("instruction", "output"), ("input", "system", "history", *_RENDERED), _alpaca),
    "prompt-completion": Form(("prompt", "completion"), _RENDERED, _prompt_completion),
    "text": Form(("text",), (), _only_text),
    "preference": Form(("chosen", "rejected"), ("prompt", "tools", "functions"), _preference),
    "kto": Form(("prompt", "completion", "label"), ("tools", "functions"), _rated),
    "reward": Form(("prompt", "answer"), ("tools", "functions"), _problem),
}
_ORDER: tuple[FormName, ...] = (
    *("chat", "sharegpt", "preference", "kto", "prompt-completion", "alpaca", "reward", "text"),
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
    text = _text(row, "system", where) if "system" in row else ""
    if not text.strip():
        return ()
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == text:
            return ()
        raise UserError(f"{where}: the system column and the first message (role system) differ")
    return _turn("system", text)


def _turn(role: str, content: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},)


def _prompt(row: Mapping[str, Any], name: str, where: str) -> Prompt:
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: {name} is {kind(value)}, expected a string or a list of messages")
    return read_messages(value, where, name)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f"{where}: {name} is {kind(row[name])}, expected a string")
    return row[name]


def _not_empty(text: str, name: str, where: str) -> None:
    if not text.strip():
        raise UserError(f"{where}: {name} is empty; expected text to train on")


def _shared_text(first: str, second: str) -> str:
    """Returns the common prefix of two texts, up to the last word boundary."""
    shared = "".join(a for a, _ in _shared(first, second))
    words = shared if shared[-1:].isspace() else shared[: 1 + max(shared.rfind(space) for space in " \n\t")]
    return words.rstrip()


def _shared_messages(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(a for a, _ in _shared(first, second))


def _shared(first: Iterable[Any], second: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    return takewhile(lambda pair: pair[0] == pair[1], zip(first, second))


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | str) and (value.lower() if isinstance(value, str) else value) in _LABELS


def _mixed(where: str, **values: Prompt) -> UserError:
    what = " and ".join(f"{name} is {'text' if isinstance(v, str) else 'messages'}" for name, v in values.items())
    return UserError(f"{where}: {what}; expected both as text or both as messages")


def _list_names(columns: Any) -> str:
    names = [str(name) for name in columns]
    return (", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")) or "nothing"


def _names() -> str:
    return ", ".join(FORMS)
