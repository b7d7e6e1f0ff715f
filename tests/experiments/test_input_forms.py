"""Rows of every format as the one record that each means."""

import contextlib
import json
import random

import pytest

from experiments.errors import UserError
from experiments.input import forms
from experiments.input.forms import parse
from experiments.input.records import Completion, Conversation, Preference, Problem, Rated, Text

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}
FUNCTION = {"name": "height", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"type": "function", "function": {"name": "height", "arguments": {"of": "tower"}}}


def conversation(*messages, **others):
    return Conversation(messages, **others)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "form", "record"),
    [
        ({"messages": [USER, ASSISTANT], "id": 3}, "chat", conversation(USER, ASSISTANT)),
        ({"messages": json.dumps([USER, ASSISTANT])}, "chat", conversation(USER, ASSISTANT)),
        (
            {"messages": [USER, {**ASSISTANT, "weight": 0, "name": None}, ASSISTANT]},
            "chat",
            conversation(USER, {**ASSISTANT, "weight": 0}, ASSISTANT),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, "you"]}, ASSISTANT]},
            "chat",
            conversation(turn("user", [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]), ASSISTANT),
        ),
        (
            {"messages": [USER, ASSISTANT], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
            "chat",
            conversation(USER, ASSISTANT, tools=(TOOL,), template_arguments={"enable_thinking": False}),
        ),
        (
            {"messages": [USER, ASSISTANT], "tools": json.dumps([TOOL])},
            "chat",
            conversation(USER, ASSISTANT, tools=(TOOL,)),
        ),
        (
            {"messages": [USER, ASSISTANT], "tools": [json.dumps(FUNCTION)]},
            "chat",
            conversation(USER, ASSISTANT, tools=(TOOL,)),
        ),
        (
            {"messages": [USER, ASSISTANT], "functions": [FUNCTION]},
            "chat",
            conversation(USER, ASSISTANT, tools=(TOOL,)),
        ),
        ({"messages": [USER, ASSISTANT], "tools": "", "functions": []}, "chat", conversation(USER, ASSISTANT)),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "be brief"},
            "sharegpt",
            conversation(SYSTEM, USER, ASSISTANT),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "be brief"},
                    {"from": "human", "value": "how tall?"},
                    {"from": "function_call", "value": '{"name": "height", "arguments": {"of": "tower"}}'},
                    {"from": "observation", "value": "90"},
                    {"from": "gpt", "value": "90 m", "weight": 1},
                ],
                "tools": json.dumps([FUNCTION]),
            },
            "sharegpt",
            conversation(
                SYSTEM,
                turn("user", "how tall?"),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                turn("tool", "90"),
                {**turn("assistant", "90 m"), "weight": 1},
                tools=(TOOL,),
            ),
        ),
        ({"conversations": [USER, ASSISTANT]}, "sharegpt", conversation(USER, ASSISTANT)),
        (
            {"instruction": "Add.", "input": "1 and 1", "output": "2"},
            "alpaca",
            conversation(turn("user", "Add.\n\n1 and 1"), turn("assistant", "2")),
        ),
        (
            {"instruction": "hi", "input": "", "output": "ho", "text": "### Instruction: hi"},
            "alpaca",
            conversation(USER, ASSISTANT),
        ),
        (
            {"instruction": "again", "output": "ha", "system": "be brief", "history": [["hi", "ho"]]},
            "alpaca",
            conversation(SYSTEM, USER, ASSISTANT, turn("user", "again"), turn("assistant", "ha")),
        ),
        ({"prompt": "a ", "completion": " b\n"}, "prompt-completion", Completion("a ", " b\n")),
        ({"prompt": "a", "completion": "b", "label": "animals"}, "prompt-completion", Completion("a", "b")),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            "prompt-completion",
            conversation(USER, ASSISTANT, USER, ASSISTANT, learn_from=3),
        ),
        (
            {"prompt": "hi", "completion": "ho", "tools": [TOOL]},
            "prompt-completion",
            conversation(USER, ASSISTANT, tools=(TOOL,), learn_from=1),
        ),
        ({"text": " once "}, "text", Text(" once ")),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference", Preference("p", "a", "b")),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            "preference",
            Preference("The sky is", " blue.", " black."),
        ),
        ({"chosen": "Q: 1+1?\nA: 2", "rejected": "Q: 1+1?\nA: 3"}, "preference", Preference("Q: 1+1?\nA:", " 2", " 3")),
        ({"chosen": "yes", "rejected": "yesterday"}, "preference", Preference("", "yes", "yesterday")),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, turn("assistant", "hu")]},
            "preference",
            Preference((USER,), (ASSISTANT,), (turn("assistant", "hu"),)),
        ),
        (
            {"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, turn("assistant", "hu")]},
            "preference",
            Preference((USER,), (ASSISTANT,), (turn("assistant", "hu"),)),
        ),
        (
            {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [turn("assistant", "hu")], "tools": [TOOL]},
            "preference",
            Preference((USER,), (ASSISTANT,), (turn("assistant", "hu"),), (TOOL,)),
        ),
        ({"prompt": "p", "completion": "c", "label": True}, "kto", Rated("p", "c", True)),
        ({"prompt": "p", "completion": "c", "label": "False"}, "kto", Rated("p", "c", False)),
        ({"prompt": [USER], "completion": [ASSISTANT], "label": 0}, "kto", Rated((USER,), (ASSISTANT,), False)),
        ({"prompt": "1+1?", "answer": "2"}, "reward", Problem("1+1?", "2")),
        ({"prompt": [USER], "answer": 2}, "reward", Problem((USER,), "2")),
    ],
)
def test_a_row_and_its_record(row, form, record):
    assert parse(row, "x") == (form, record)
    assert parse(row, "x", form) == (form, record)


@pytest.mark.parametrize("missing", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"function": {"name": "height", "arguments": '{"of": "tower"}'}}]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [{"name": "height", "arguments": {"of": "tower"}}]},
        {"function_call": {"name": "height", "arguments": '{"of": "tower"}'}, "tool_calls": None},
    ],
)
def test_tool_calls_in_every_spelling(calls, missing):
    result = {"role": "function", "name": "height", "content": "90"}
    _, record = parse({"messages": [USER, {"role": "assistant", **missing, **calls}, result, ASSISTANT]}, "x")
    calling = {"role": "assistant", "content": missing.get("content"), "tool_calls": [CALL]}
    assert record == conversation(USER, calling, {"role": "tool", "content": "90", "name": "height"}, ASSISTANT)


def test_a_call_keeps_its_id_and_may_have_no_arguments():
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    _, record = parse({"messages": [USER, message, {**turn("tool", "9"), "tool_call_id": "c1"}]}, "x")
    assert record.messages[1]["tool_calls"] == [{**call, "function": {"name": "now", "arguments": {}}}]
    assert record.messages[2]["tool_call_id"] == "c1"


def test_a_format_that_is_asked_for():
    row = {"prompt": "p", "completion": "c", "label": True, "messages": [USER, ASSISTANT]}
    assert parse(row, "x", "prompt-completion")[1] == Completion("p", "c")
    assert parse(row, "x", "kto")[1] == Rated("p", "c", True)
    with pytest.raises(UserError, match=r"x: missing instruction and output; the format alpaca has .*got prompt, comp"):
        parse(row, "x", "alpaca")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "x, messages: not JSON"),
        ({"messages": [{"role": 1, "content": "a"}]}, "message 1: role is a number, expected a string"),
        (
            {"messages": [{"role": "assistant", "content": 5}]},
            "message 1: content is a number, expected a string or te",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part 1: type is 'image_url', exp"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "message 2: weight is 0.5, expected 0"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]},
            "message 2, call 1: got an object, expected",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "message 2, call 1, arguments: not JSON",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "arguments is a list, expected an object",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [TOOL], "functions": [FUNCTION]}, "both tools and functions"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools is an object, expected a list of tools"),
        ({"messages": [USER, ASSISTANT], "functions": [{"parameters": {}}]}, "functions, item 1: got an object"),
        (
            {"conversations": [{"from": "alien", "value": "a"}]},
            "message 1: from is 'alien', expected one of human, user",
        ),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "message 1: value is a number"),
        ({"conversations": [SYSTEM, USER, ASSISTANT], "system": "talk"}, "the system column and the first message"),
        ({"instruction": "a", "output": " "}, "output is empty"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction and input are empty"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history 1: expected a pair of strings"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "prompt is text and completion is messages; expected both"),
        ({"prompt": [USER], "completion": [USER]}, "none of the 1 messages has the role assistant"),
        ({"text": ""}, "text is empty"),
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "prompt is messages and chosen is text"),
        (
            {"chosen": [ASSISTANT], "rejected": [USER, ASSISTANT]},
            "start with different messages; expected a prompt",
        ),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "rejected has no message after the prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"prompt": "a", "answer": {}}, "answer is an object, expected a string"),
        ({"conversation": [], "id": 1}, "got conversation, id, expected .* the nearest is sharegpt: conversations"),
        ({"query": "a", "response": "b"}, "got query, response, expected the columns of a format"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(UserError, match=message):
        parse(row, "x")


def test_any_value_in_any_column_is_a_record_or_a_sentence():
    rng = random.Random(0)
    names = [
        *sorted(forms.COLUMNS),
        "role",
        "content",
        "from",
        "value",
        "function",
        "name",
        "arguments",
        "weight",
        "type",
    ]

    def value(depth):
        leaves = [None, True, 0, 1.5, "", "a", "assistant", "[", "[1]", '{"name": "f"}', "null", "\ud800"]
        if depth > 4 or rng.random() < 0.4:
            return rng.choice(leaves)
        if rng.random() < 0.5:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randrange(5))}

    read = 0
    for _ in range(5000):
        required = rng.choice(list(forms.FORMS.values())).required
        row = {**{name: value(0) for name in rng.sample(names, 3)}, **{name: value(1) for name in required}}
        for form in (None, rng.choice(list(forms.FORMS))):
            with contextlib.suppress(UserError):
                parse(row, "x", form)
                read += 1
    assert 100 < read < 9900
