"""Commands in the documentation that the tests do not run: they are parsed by the programs that they call."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence

from documentation.pages import ROOT

from experiments import command_line, flags
from lora_jax.__main__ import main as lora_jax_main

OTHERS = {"export", "for", "done", "git", "gcloud", "huggingface-cli", "srun", "sbatch", "tar", "vllm", "wait"}
"""Programs of others, and words of the shell, which are not checked."""

LLAMA_CPP = {"llama-cli", "llama-server", "convert_lora_to_gguf.py", "mlx_lm.generate"}

_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*$")


def split(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of a block, without comments, assignments, `uv run` and the like."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        command: list[str] = []
        for word in (*lexer, ";"):
            if set(word) <= set(";&|"):
                if command:
                    yield command
                command = []
            elif command or not (word == "do" or _ASSIGNMENT.match(word)):
                command.append(word)


def check(words: Sequence[str]) -> None:
    """Raises an assertion error unless a program accepts a command, as far as that can be seen without running it."""
    match list(words):
        case ["uv", "run", *rest]:
            while rest and rest[0].startswith("--"):
                rest = rest[2:] if rest[0] in ("--extra", "--group") else rest[1:]
            check(rest)
        case ["python", "-m", "experiments.run", *rest]:
            _check_study(rest)
        case ["python" | "python3", "-m", "pip" | "uv", *rest]:
            check([words[2], *rest])
        case ["python", "-m", "lora_jax", *rest] | ["lora-jax", *rest]:
            _check_lora_jax(rest)
        case ["python", "-m", module, *rest]:
            assert importlib.util.find_spec(module), f"no module {module}"
            _check_options(f"{sys.executable} -m {module}", rest)
        case ["pip", "install", *rest]:
            options = [word for word in rest if word.startswith("-")]  # pip is not in environments that uv makes
            assert not options, f"pip install: nothing checks {options[0]}"
        case [program, *rest] if program.startswith("scripts/"):
            _check_script(program, rest)
        case [program, *_]:
            assert program in OTHERS | LLAMA_CPP, f"{program}: nothing checks this program"


def _check_study(words: Sequence[str]) -> None:
    """Parses the flags of a study into its config."""
    if words in (["--list"], ["--help"]):
        return
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            flags.parse(command_line.find_config(words[0]).DEFAULTS, "study", list(words[1:]))
    except SystemExit as stop:
        assert stop.code == 0, output.getvalue()
    except ValueError as error:
        raise AssertionError(str(error)) from error


def _check_lora_jax(words: Sequence[str]) -> None:
    """Parses arguments, with files that do not exist: what is parsed ends with an error of a file."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = lora_jax_main(list(words))
    assert status == 0 or "usage:" not in output.getvalue(), output.getvalue()


@functools.cache
def _help(command: str) -> str:
    done = subprocess.run([*shlex.split(command), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _check_options(command: str, words: Sequence[str]) -> None:
    """Compares the options of a command with its help."""
    options = set(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", _help(command)))
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("-") or option in options, f"{command} has no option {option}"


def _check_script(program: str, words: Sequence[str]) -> None:
    """Compares the first argument of a script of this repository with its help."""
    usage = _help(str(ROOT / program))
    for word in words[:1]:
        assert re.search(rf"{re.escape(program)} \[?{re.escape(word)}\b", usage), f"{program} has no {word}"
