"""Every block of the documentation runs: Python, and commands unless they are marked with what they need."""

import contextlib
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from documentation import commands
from documentation.pages import DOCS, PAGES, ROOT, blocks, name

from lora_jax.adapters.protocol import KINDS
from lora_jax.transform.registry import RULES

RUNNABLE = [page for page in PAGES if any(block.language in ("python", "bash") for block in blocks(page))]
LANGUAGES = {"python", "bash", "text", "json", "toml"}


@pytest.fixture
def registries():
    """Pages register adapters and rules; the tests that follow have the library's own."""
    originals = [(registry, dict(registry)) for registry in (KINDS, RULES)]
    yield
    for registry, original in originals:
        registry.clear()
        registry.update(original)


def expectation(text: str) -> re.Pattern:
    """The output that a block of text shows: white space is not compared, and `…` stands for anything."""
    words = [re.escape(part).replace("…", ".*?") for part in text.split()]
    return re.compile(r"\s*" + r"\s+".join(words) + r"\s*", re.DOTALL)


def execute(block, page, names) -> str:
    """Runs a block of Python and returns what it prints. Its lines have their numbers in the page."""
    output = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    with contextlib.redirect_stdout(output):
        exec(code, names)
    return output.getvalue()


def run_commands(text: str, folder: Path) -> str:
    """Runs a block of commands in a folder, with the programs of this environment, and returns what they print."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def old_names(page):
    """Libraries that pages compare with, such as qwix 0.1.8, use names that Flax deprecates."""
    with warnings.catch_warnings():
        if page.parent.name == "coming_from":
            warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_blocks_run(page, lenient, old_names, registries, tmp_path, monkeypatch):
    """The Python blocks of a page share their names; all blocks share a folder and run in the order of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # otherwise keras writes its settings to the home directory
    names: dict = {"__name__": "__page__"}
    output = None
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{name(page)}:{block.line}: a block of {block.language or 'no language'}"
        if block.language == "python":
            output = execute(block, page, names)
        elif block.language == "bash":
            output = None if block.needs else run_commands(block.text, tmp_path)
        elif block.language == "text" and block.adjacent and output is not None:
            assert expectation(block.text).fullmatch(output), f"{name(page)}:{block.line} prints\n{output}"


MARKED = [
    pytest.param(block.text, id=f"{name(page)}:{block.line}")
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash" and block.needs is not None
]


@pytest.mark.parametrize("text", MARKED)
def test_marked_commands_parse(text):
    for words in commands.split(text):
        commands.check(words)


@pytest.mark.parametrize(
    "command",
    [
        "python -m experiments.run sft --rank x8",
        "python -m experiments.run sfft",
        "uv run python -m experiments.run sft --methods lora,nothing-like-it --nope 1",
        "python -m experiments.benchmarks.step --nope",
        "python -m experiments.no_such_module",
        "lora-jax inspect",
        "lora-jax convert a b --target nobody",
        "scripts/check nothing",
        "pip install --nope lora-jax",
        "no-such-program --help",
    ],
)
def test_wrong_commands_do_not_parse(command):
    with pytest.raises(AssertionError):
        for words in commands.split(f"# needs a test\n{command}\n"):
            commands.check(words)


def test_the_start_is_twelve_lines():
    first = next(block for block in blocks(DOCS / "index.md") if block.language == "python")
    assert len([line for line in first.text.splitlines() if line.strip()]) == 12


def test_expectations():
    assert expectation("a … c\n").fullmatch("a  b\nc\n") and expectation("[…]").fullmatch("[1, 2]")
    assert not expectation("a b").fullmatch("a b c")
