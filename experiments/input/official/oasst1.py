"""OASST1: trees of messages, of which the best reply at each level makes a conversation; and what QLoRA's authors made
of it (openassistant-guanaco).

References:
  Köpf et al., `OpenAssistant Conversations <https://arxiv.org/abs/2304.07327>`_, 2023
  Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §4
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.input.forms import parse
from experiments.input.official.layout import Example, Layout, Rows, json_rows, value
from experiments.input.records import Conversation
from experiments.input.strict_json import kind

_ROLES = {"prompter": "user", "assistant": "assistant"}


def _rows(paths: Sequence[Path], split: str) -> Rows:
    """Returns the best path of each tree that has an answer."""
    rows = json_rows(paths, split)
    if rows and isinstance(rows[0][1], Mapping) and "message_tree_id" in rows[0][1] and "prompt" in rows[0][1]:
        trees = [(where, value(row, "prompt", dict, where)) for where, row in rows]
        return _conversations((where, _best(prompt, where)) for where, prompt in trees)
    return _from_messages(rows)


def _best(message: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """Returns a message and the best replies to it."""
    messages = [message]
    while replies := [reply for reply in _replies(messages[-1], where) if not reply.get("deleted")]:
        messages.append(min(replies, key=lambda reply: _rank(reply, where)))
    return messages


def _replies(message: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    replies = [] if message.get("replies") is None else value(message, "replies", list, where)
    if wrong := [reply for reply in replies if not isinstance(reply, Mapping)]:
        raise UserError(f"{where}: a reply is {kind(wrong[0])}, expected an object")
    return replies


def _rank(message: Mapping[str, Any], where: str) -> float:
    """Returns the rank among the replies to the same message, 0 for the best; unranked ones are last."""
    return math.inf if message.get("rank") is None else value(message, "rank", int, where)


def _from_messages(rows: Iterable[tuple[str, Any]]) -> Rows:
    """Returns the best path of each tree whose messages are in separate rows."""
    messages = {value(row, "message_id", str, where): (where, {**row, "replies": []}) for where, row in rows}
    roots = []
    for where, message in messages.values():
        parent = message.get("parent_id")
        if parent is None:
            roots.append((where, message))
        elif not isinstance(parent, str) or parent not in messages:
            raise UserError(f"{where}: the parent {parent} of this message is not in the file")
        else:
            messages[parent][1]["replies"].append(message)
    return _conversations((where, _best(root, where)) for where, root in roots)


def _conversations(paths: Iterable[tuple[str, list[Mapping[str, Any]]]]) -> Rows:
    """Removes questions without an answer from the ends of conversations, and conversations without an answer."""
    result = []
    for where, messages in paths:
        turns = [(value(message, "role", str, where), value(message, "text", str, where)) for message in messages]
        if unknown := [role for role, _ in turns if role not in _ROLES]:
            raise UserError(f"{where}: role is {unknown[0]!r}, expected prompter or assistant")
        while turns and turns[-1][0] == "prompter":
            turns.pop()
        if turns:
            result.append((where, turns))
    return result


def _example(turns: list[tuple[str, str]], where: str) -> Example:
    messages = tuple({"role": _ROLES[role], "content": text} for role, text in turns)
    return Example(Conversation(messages), (turns[-1][1],))


def _text(row: Any, where: str) -> Example:
    return Example(parse(row, where, "text")[1], (row["text"],))


LAYOUTS = [
    Layout(
        "oasst1",
        {"train": [["*oasst_ready?trees.jsonl*"], ["*oasst*trees.jsonl*"], ["*oasst*messages.jsonl*"]]},
        _example,
        _rows,
        hub="OpenAssistant/oasst1",
        hub_splits={"validation": "validation"},
        hub_rows=_from_messages,
    ),
    Layout(
        "guanaco",
        {
            "train": [["openassistant_best_replies_train.jsonl"]],
            "validation": [["openassistant_best_replies_eval.jsonl"]],
        },
        _text,
        hub="timdettmers/openassistant-guanaco",
    ),
]
