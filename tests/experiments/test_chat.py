"""Conversations with a base and an adapter: in a pipe, at a terminal, and the tokens that are read."""

import dataclasses
import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from experiments import run
from experiments.configs import chat as config
from experiments.studies import chat
from experiments.studies.conversation import Talk
from experiments.studies.sft import recorded
from experiments.studies.sft.assistant import Assistant
from tests.experiments.conftest import SYSTEM

ADAPTER = "out/lora"


def pipe(monkeypatch, capsys, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = run.main(["chat", "--new-tokens", "5", *map(str, flags)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def loaded(tuned):
    trained, system = recorded.restore(tuned / ADAPTER / "adapter-best")
    assistant = Assistant.of(trained)
    base, delta = assistant.load(tuned / ADAPTER / "adapter-best")
    return assistant, {"adapter": (base, delta), "base": (base, {})}, system


def talk(loaded, **settings):
    return Talk(dataclasses.replace(config.DEFAULTS, new_tokens=5, **settings), *loaded)


def test_a_pipe_has_one_answer_per_line(tuned, monkeypatch, capsys, loaded):
    lines = "1 + 1?\n\n/base\n2 + 2?\n/adapter\n/reset\n1 + 1?\n/help\n/quit\n3 + 3?\n"
    status, out, err = pipe(monkeypatch, capsys, lines, "--adapter", tuned / ADAPTER)
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == third  # a new conversation with the same model
    conversation = talk(loaded)
    assert " ".join("".join(conversation.answer("1 + 1?")).split()) == first
    conversation.active = "base"
    assert " ".join("".join(conversation.answer("2 + 2?")).split()) == second  # which knows the first turn


def test_the_base_alone(tuned, monkeypatch, capsys, loaded):
    flags = ("--model", tuned / "model", "--system", SYSTEM)
    status, out, err = pipe(monkeypatch, capsys, "2 + 2?\n", *flags)
    conversation = talk(loaded)
    conversation.active = "base"
    assert (status, err) == (0, "")
    assert out == " ".join("".join(conversation.answer("2 + 2?")).split()) + "\n"
    status, out, err = pipe(monkeypatch, capsys, "/adapter\n", *flags)
    assert (status, out, err) == (2, "", "error: there is no adapter; start again with --adapter DIR\n")


def test_only_new_tokens_of_a_conversation_are_read(loaded):
    conversation, again = talk(loaded), talk(loaded)
    assert loaded[2] == SYSTEM
    first = "".join(conversation.answer("1 + 1?"))
    read = conversation.tokens_read
    second = "".join(conversation.answer("2 + 2?"))
    encode = loaded[0].encoder.tokenizer.encode
    turn = encode(f"{first}\n<|user|>2 + 2?\n<|assistant|>", add_special_tokens=False).ids
    assert conversation.tokens_read - read <= len(turn) + 5  # the answer's tokens may be others once it is text
    assert "".join(again.answer("1 + 1?")) == first and "".join(again.answer("2 + 2?")) == second
    again.active = "base"
    list(again.answer("3 + 3?"))
    assert again.tokens_read > read  # another model reads everything itself
    again.reset()
    again.active = "adapter"
    assert "".join(again.answer("1 + 1?")) == first


def test_a_conversation_that_is_too_long_is_one_sentence(tuned, monkeypatch, capsys):
    status, out, err = pipe(monkeypatch, capsys, "1 " * 600 + "\n", "--model", tuned / "model")
    assert (status, out) == (2, "") and "the model supports 512; /reset starts over" in err and err.count("\n") == 1


def test_without_a_template_a_line_is_continued(monkeypatch, capsys):
    status, out, err = pipe(monkeypatch, capsys, "graphics:\nsound:\ngraphics:\n", "--model", "tiny-gpt2")
    assert (status, err) == (0, "")
    first, _, third = out.splitlines()
    assert first == third


def test_samples_differ_from_the_likeliest_answer(loaded):
    greedy, sampled, again = (
        "".join(talk(loaded, **settings).answer("1 + 1?"))
        for settings in ({}, {"temperature": 2.0, "top_p": 0.95}, {"temperature": 2.0, "top_p": 0.95})
    )
    assert sampled == again != greedy


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "{tuned}/nothing"], "error: --adapter {tuned}/nothing: no such directory\n"),
        (["--adapter", "{tuned}/out/lora", "--model", "tiny-gpt2"], "error: --adapter"),
        (["--model", "./nowhere"], "error: ./nowhere: no such directory"),
        (["--temperature", "-1"], "temperature must not be negative"),
        (["--top-p", "0"], "top_p must be above 0"),
    ],
)
def test_what_a_user_can_put_right(tuned, monkeypatch, capsys, flags, message):
    monkeypatch.setenv("COLUMNS", "300")
    status, _, err = pipe(monkeypatch, capsys, "a\n", *[flag.format(tuned=tuned) for flag in flags])
    assert status == 2 and message.format(tuned=tuned) in err and "Traceback" not in err


def test_ctrl_c_ends_a_conversation(tuned, monkeypatch, capsys):
    def interrupt(self, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "answer", interrupt)
    assert pipe(monkeypatch, capsys, "a\nb\n", "--model", tuned / "model") == (0, "\n", "")


def test_a_terminal(tuned):
    """A whole conversation at a terminal of its own: prompts, commands, errors, and the end of the input."""
    command = [sys.executable, "-m", "experiments.run", "chat", "--adapter", str(tuned / ADAPTER), "--new-tokens", "4"]
    terminal, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    output = ""

    def wait_for(text, seconds=300):
        nonlocal output
        end = time.monotonic() + seconds
        while text not in output:
            assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], output
            try:
                output += os.read(terminal, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"ended after {output!r}")
        before, output = output.split(text, 1)
        return before

    def say(line):
        os.write(terminal, f"{line}\n".encode())

    wait_for("talking to the adapter; /help lists the commands")
    wait_for("adapter> ")
    say("1 + 1?")
    wait_for("1 + 1?")
    assert wait_for("adapter> ").strip()
    say("/base")
    wait_for("talking to the base")
    wait_for("base> ")
    say("/bse")
    wait_for("error: unknown command /bse; the commands are /base, /adapter, /reset, /help, /quit")
    wait_for("base> ")
    say("/help")
    wait_for("/reset     start a new conversation")
    wait_for("base> ")
    os.write(terminal, b"\x04")
    assert child.wait(60) == 0
    os.close(terminal)


def test_commands_are_documented():
    assert all(name in chat._help(None) and command.help for name, command in chat.COMMANDS.items())
