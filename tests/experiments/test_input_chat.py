"""Chat templates: the tokens and the mask that transformers gives, and errors where none can be told."""

import json
import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments.errors import UserError
from experiments.input.chat import Template
from experiments.input.encoding import load_encoder
from experiments.input.plans import plan
from experiments.input.records import Completion, Conversation
from experiments.input.template_files import load_template
from experiments.input.turns import conversation_examples
from experiments.models import location
from experiments.tasks import continuations, examples
from experiments.tasks.text import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures/chat"
STORED = json.loads((FIXTURES / "expected.json").read_text())
NAMES = sorted(STORED["expected"])


def source(name):
    return (FIXTURES / f"{name}.jinja").read_text()


def unmarked(name):
    """The template as most checkpoints have it: without generation blocks."""
    return re.sub(r"\{%(-?) (end)?generation %\}", r"{%\1 set nothing = 0 %}", source(name))


def checkpoint(directory, name, template, **config):
    """The directory that the fixture's generator has made, with another template."""
    tokenizer = Tokenizer.from_file(str(location.find("tiny-llama") / "tokenizer.json"))
    tokenizer.add_special_tokens(STORED["special"].get(name, []))
    tokenizer.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": template, **config}))
    return directory


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_targets_are_those_of_transformers(tmp_path, name, marks):
    encoder = load_encoder(checkpoint(tmp_path, name, source(name) if marks else unmarked(name)), None)
    assert encoder.template.marks_generation == marks
    for what, one in STORED["expected"][name].items():
        record = Conversation(tuple(one["messages"]))
        assert encoder.template.render(record.messages, what) == one["text"]
        ((tokens, targets),) = encoder.encode([record], [what])
        assert tokens.dtype == np.int32 and tokens.tolist() == one["ids"]
        np.testing.assert_array_equal(targets, np.array(one["mask"], bool))
        prompt, answer = encoder.encode_prompt(record, what)
        assert prompt.tolist() == one["prompt"]
        assert answer == [m["content"] for m in one["messages"] if m["role"] == "assistant"][-1]


def test_a_completion_is_the_assistants_where_there_is_a_template(tmp_path):
    encoder = load_encoder(checkpoint(tmp_path, "chatml", source("chatml")), 1)
    code = "    return x\n\n"  # white space is part of it
    messages = ({"role": "user", "content": "def f(x):\n"}, {"role": "assistant", "content": code})
    both = encoder.encode([Completion("def f(x):\n", code), Conversation(messages)], ["", ""])
    np.testing.assert_array_equal(both[0].tokens, both[1].tokens)
    np.testing.assert_array_equal(both[0].targets, both[1].targets)
    learned = encoder.tokenizer.decode(both[0].tokens[both[0].targets], skip_special_tokens=False)
    assert learned == f"{code}<|im_end|>"
    assert encoder.encode_prompt(Completion("def f(x):\n", code), "")[1] == code


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_without_a_template_a_completion_stands_behind_its_prompt(model):
    directory = location.find(model)
    encoder = load_encoder(directory, 1 if model == "tiny-llama" else 0)
    texts = examples.load("debian_sections", "validation", 40).texts
    encoded = encoder.encode([Completion("mail:", f" {text}") for text in texts], [""] * 40)
    expected = continuations.encode(load_tokenizer(directory), ["mail:"] * 40, texts, 10_000, encoder.end)
    for (tokens, targets), sequence, labels in zip(encoded, expected.sequences, expected.labels):
        np.testing.assert_array_equal(tokens[:-1], sequence)
        np.testing.assert_array_equal(np.where(targets, tokens, -1)[1:], labels)
    prompt, answer = encoder.encode_prompt(Completion("mail:", f" {texts[0]}"), "")
    np.testing.assert_array_equal(prompt, encoded[0].tokens[~encoded[0].targets])
    assert answer == f" {texts[0]}"
    with pytest.raises(UserError, match=r"here: a conversation needs a chat template, but .*tiny.* has none"):
        encoder.encode([Conversation(({"role": "user", "content": "?"},))], ["here"])


def test_where_a_template_is_found(tmp_path):
    assert load_template(tmp_path) is None
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": [{"name": "tool", "template": "x"}]}')
    with pytest.raises(UserError, match="expected a chat template named default, got tool"):
        load_template(tmp_path)
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ bos_token + eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": "<b>"}))
    assert load_template(tmp_path).render([], "") == "<b></s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages | tojson }}")
    assert load_template(tmp_path).render([{"role": "<é>"}], "") == 'file [{"role": "<é>"}]'
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"chat_template.jinja: the chat template is not valid Jinja"):
        load_template(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: cannot be read as JSON"):
        load_template(tmp_path)


def template(text, **kwargs):
    return Template(text, {}, "here.jinja", **kwargs)


def test_what_templates_may_call():
    loop = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}"
    assert template(loop).render([{"content": x} for x in "abc"], "") == "b"
    date = "{{ strftime_now('%d %b %Y') }}"
    assert template(date).render([], "") == "26 Jul 2024"
    assert template(date, today=datetime(2031, 5, 6)).render([], "") == "06 May 2031"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ().__class__.__mro__ }}", "unsafe"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_what_a_template_refuses_is_said(text, reason):
    with pytest.raises(UserError, match=f"line 3: .* here.jinja does not accept the messages .*{reason}"):
        template(text).render([{"role": "user", "content": "?"}], "line 3")


def examples_of(text, messages):
    planned = plan(template(text), Conversation(tuple(messages)), "line 3", "answers")
    renderings = planned.template.renderings(planned.calls, "line 3")
    return conversation_examples(planned, renderings, set())


def test_turns_that_cannot_be_told_apart_are_an_error():
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    last_only = "{% for m in messages %}{{ m.role if loop.last else '-' }}{% endfor %}"
    with pytest.raises(
        UserError,
        match=r"line 3, message 4: cannot locate the answer",
    ):
        examples_of(last_only, messages)
    nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
    with pytest.raises(UserError, match="blocks are nested"):
        examples_of(nested, messages)


def test_a_conversation_needs_a_turn_of_the_assistants(tmp_path):
    encoder = load_encoder(checkpoint(tmp_path, "llama3", unmarked("llama3")), None)
    question = Conversation(({"role": "user", "content": "?"},))
    for wrong in (lambda: encoder.encode([question], ["line 3"]), lambda: encoder.encode_prompt(question, "line 3")):
        with pytest.raises(UserError, match="line 3: none of the 1 messages has the role assistant"):
            wrong()
