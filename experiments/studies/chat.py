"""Talks to a base and an adapter in the terminal, or answers the lines of a pipe."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from experiments.configs.chat import Config
from experiments.errors import UserError
from experiments.studies.conversation import Talk
from experiments.studies.sft import recorded
from experiments.studies.sft.assistant import Assistant

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Command:
    """What a line that begins with a slash does.

    Attributes:
      help: A line for `/help`.
      run: Returns what to print; None ends the conversation.
    """

    help: str
    run: Callable[[Talk], str | None]


def run(config: Config) -> None:
    """Answers each line of the standard input until it ends.

    Raises:
      UserError: Model or adapter are missing, malformed or incompatible, or a message cannot be answered.
    """
    talk = _load(config)
    try:
        if sys.stdin.isatty():
            _converse(talk)
        else:
            _answer_lines(talk)
    except KeyboardInterrupt:
        print()


def _load(config: Config) -> Talk:
    adapter = None if config.adapter is None else recorded.find_adapter(config.adapter)
    fields = ("model", "quantize", "dtype", "template")
    trained, system = recorded.restore(adapter, **{name: getattr(config, name) for name in fields})
    assistant = Assistant.of(trained)
    base, delta = assistant.load(adapter)
    params = {ADAPTER: (base, delta)} if delta else {}
    return Talk(config, assistant, params | {BASE: (base, {})}, system if config.system is None else config.system)


def _converse(talk: Talk) -> None:
    """Talks to a person at a terminal."""
    import readline  # noqa: F401  (input() edits lines with it)

    print(f"talking to the {talk.active}; /help lists the commands")
    while True:
        try:
            line = input(f"{talk.active}> ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                if (text := _find_command(line).run(talk)) is None:
                    return
                print(text)
            else:
                for part in talk.answer(line):
                    print(part, end="", flush=True)
                print()
        except UserError as error:
            print(f"error: {error}")


def _answer_lines(talk: Talk) -> None:
    """Answers the lines of a file or pipe, each in one line."""
    for line in map(str.strip, sys.stdin):
        if line in COMMANDS:
            if COMMANDS[line].run(talk) is None:
                return
        elif line:
            print(" ".join("".join(talk.answer(line)).split()), flush=True)


def _find_command(line: str) -> Command:
    if line not in COMMANDS:
        raise UserError(f"unknown command {line}; the commands are {', '.join(COMMANDS)}")
    return COMMANDS[line]


def _switch(name: str) -> Callable[[Talk], str]:
    def switch(talk: Talk) -> str:
        if name not in talk.models:
            raise UserError("there is no adapter; start again with --adapter DIR")
        talk.active = name
        return f"talking to the {name}"

    return switch


def _reset(talk: Talk) -> str:
    talk.reset()
    return "a new conversation"


def _help(talk: Talk) -> str:
    return "\n".join(f"{name:10} {command.help}" for name, command in COMMANDS.items())


COMMANDS = {
    "/base": Command("let the base answer", _switch(BASE)),
    "/adapter": Command("let the base with the adapter answer", _switch(ADAPTER)),
    "/reset": Command("start a new conversation", _reset),
    "/help": Command("list the commands", _help),
    "/quit": Command("end, as the end of the input and Ctrl-C do", lambda talk: None),
}
