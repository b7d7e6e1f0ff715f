"""Chat templates as programs of strangers: bounded, and every failure in one sentence."""

import json
import subprocess
import sys
import time

import pytest

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.input import rendering
from experiments.input.chat import Template
from experiments.input.options import Options, parse_arguments
from experiments.input.template_files import load_template, special_tokens
from experiments.models import location
from experiments.studies.decoder.encoding import read_end_tokens
from experiments.tasks.text import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 10) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 'x'.ljust(10 ** 10) }}",
        "{{ messages[0].content.ljust(10 ** 10) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ (messages[0].content * 1000000).replace('h', 'x' * 1000000) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ range(99999) | join('x' * 100000) }}",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{% for i in range(9999) %}{% set x %}{{ a(1) }}{% endset %}"
        "{% endfor %}",
        "{% generation %}{% break %}{% endgeneration %}",
        "{" * 10 + "{" + "(" * 100_000,
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ 'x' | batch(10 ** 10, 'x') | list }}",
        "{{ messages | tojson(indent=10 ** 10) }}",
    ],
)
def test_time_memory_and_output_are_bounded(source, monkeypatch):
    monkeypatch.setattr(rendering, "MEMORY", 1 << 28)
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        Template(source, {}, "far/chat_template.jinja", seconds=1.0).render(MESSAGES, "data.jsonl, line 3")
    assert time.monotonic() - started < 30
    message = str(raised.value)
    assert "far/chat_template.jinja" in message and "\n" not in message and len(message) < 2000


def test_a_template_that_has_exceeded_its_time_can_render_again():
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = f"{{% if messages[0].content == 'slow' %}}{loop}{{% endif %}}ok"
    template = Template(source, {}, "here.jinja", seconds=0.5)
    for _ in range(2):
        with pytest.raises(UserError, match=r"line 3: the chat template of here.jinja .*takes more than 0.5 s"):
            template.render([{"role": "user", "content": "slow"}], "line 3")
        assert template.render(MESSAGES, "line 4") == "ok"


def test_the_time_is_bounded_where_the_parent_ignores_the_signal():
    # In a process of its own: libtpu's profiler, which other tests load, relies on its handler of this signal.
    program = """
import signal

signal.signal(signal.SIGPROF, signal.SIG_IGN)
from experiments.errors import UserError
from experiments.input.chat import Template

loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
try:
    Template(loop, {}, "here.jinja", seconds=0.5).render([{"role": "user", "content": "hello"}], "line 1")
except UserError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "takes more than 0.5 s" in run.stdout


def test_large_records_are_rendered():
    content = "x" * 3_000_000
    assert Template("{{ messages[0].content }}", {}, "").render([{"content": content}], "") == content


def test_nested_messages():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(UserError, match=r"line 3: .*nested too deeply"):
        Template("{{ messages }}", {}, "").render([{"role": "user", "content": "", "extra": nested}], "line 3")
    # A record that Python reads may be too deep for a template that writes it.
    for _ in range(300):
        nested = {"a": nested} if isinstance(nested, dict) else {}
    assert Template("{{ messages | tojson }}", {}, "").render([{"role": "user", "x": nested}], "").count("a") > 250


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"chat_template": 3}, "tokenizer_config.json: chat_template is 3, expected a string, or a list"),
        ({"chat_template": {"a": 1}}, "tokenizer_config.json: chat_template is .*expected a string, or a list"),
        ({"chat_template": [1]}, "tokenizer_config.json: chat_template is .*expected a string, or a list"),
        ({"chat_template": [{"name": "default"}]}, "expected a string, or a list of objects with name and template"),
        ({"chat_template": [{"name": ["default"], "template": ""}]}, "expected a string, or a list of objects"),
        ({"chat_template": "x", "eos_token": 7}, "tokenizer_config.json: eos_token is 7, expected a string"),
        ({"chat_template": "x", "eos_token": {"content": 7}}, "tokenizer_config.json: eos_token is "),
        ({"chat_template": "x", "bos_token": ["<s>"]}, "tokenizer_config.json: bos_token is "),
        ([], "tokenizer_config.json: expected a JSON object"),
    ],
)
def test_fields_of_the_wrong_type(tmp_path, content, reason):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason):
        load_template(tmp_path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"chat_template": ' + "[" * 100_000, "{", "\ufeff{}", "\x00", '"\\ud800"']
)
def test_damaged_configs(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: "):
        load_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read"):
        special_tokens(tmp_path)


def test_a_post_processor_that_uses_a_missing_token(tmp_path):
    content = json.loads((location.find("tiny-llama") / "tokenizer.json").read_text())
    content["post_processor"]["processors"][1]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer.json: .*uses the undefined token <\|begin_of_text\|>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("number", ["2", [1, None], {"a": 1}, 2.5, -1, 1 << 40])
def test_ends_of_the_wrong_type(tmp_path, number):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": number}))
    with pytest.raises(UserError, match=r"eos_token_id is .*, expected a token id or a list of them"):
        read_end_tokens(tmp_path)


def test_another_template(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("own")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("for rag")
    (tmp_path / "other.jinja").write_text("other {{ bos_token }} {{ level }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')

    def rendered(template, **arguments):
        return load_template(tmp_path, template=template, arguments=arguments).render([], "")

    assert rendered(None) == "own" and rendered("rag") == "for rag"
    assert rendered(str(tmp_path / "other.jinja"), level=2) == "other <s> 2"
    assert rendered("text {{ level }}", level=2) == "text 2"
    with pytest.raises(
        UserError, match=r"--template no.jinja: no such file; the checkpoint has the templates rag, default"
    ):
        rendered("no.jinja")


def test_arguments_of_a_command_line():
    assert parse_arguments(["a=true", '{"b": [1]}', "c=x=y"]) == {"a": True, "b": [1], "c": "x=y"}
    for wrong in ("enable_thinking", "[1]", "3", "{", "[" * 100_000):
        with pytest.raises(ValueError, match="expected a JSON object or NAME=VALUE"):
            parse_arguments([wrong])
        with pytest.raises(ValueError, match="expected a JSON object or NAME=VALUE"):
            Config(template_arguments=(wrong,))
    flags = {"train_on": "last", "control_tokens": "parse", "tokenize_together": True, "template": "x.jinja"}
    expected = Options(**flags, template_arguments={"enable_thinking": False})
    assert Config(**flags, template_arguments=("enable_thinking=false",)).encoding() == expected
