"""The check of names finds every way in which Python binds one, and nothing else."""

import doctest
import subprocess
import sys

import pytest

from scripts import names

BINDINGS = (
    "found = 1",
    "found: int = 1",
    "found += 1",
    "_found_ = 1",
    "(other, *found) = (1, 2)",
    "if (found := 1): pass",
    "for found in (): pass",
    "[found for found in ()]",
    "with open('x') as found: pass",
    "try: pass\nexcept OSError as found: pass",
    "import found",
    "import found.part",
    "import numpy as found",
    "from numpy import array as found",
    "def found(): pass",
    "async def found(): pass",
    "class found: pass",
    "class C:\n  found: int",
    "def f(found): pass",
    "def f(*found): pass",
    "def f(*, found=1): pass",
    "def f(**found): pass",
    "lambda found: 1",
    "x.found = 1",
    "match x:\n  case found: pass",
    "match x:\n  case [1, *found]: pass",
    "match x:\n  case {1: 2, **found}: pass",
)

USES = (
    "'found'",
    "# found\nx = 'the value found'",
    "found_at = refound = unfound = 1",
    "x.found",
    "f(found=1)",
    "x['found'] = 1",
    "import x.found as y",
    "from .found import y",
)


@pytest.mark.parametrize("source", BINDINGS)
def test_bindings(source):
    [(line, name)] = names.forbidden_names(source)
    assert name.strip("_") == "found"
    assert "found" in source.splitlines()[line - 1]


@pytest.mark.parametrize("source", USES)
def test_uses_of_other_peoples_names_and_words_are_allowed(source):
    assert names.forbidden_names(source) == []


def test_the_command_names_file_line_and_name(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "good.py").write_text("size = 1\n")
    (tmp_path / "package" / "bad.py").write_text("size = 1\nfound = kept = 2\n")

    def run(*paths):
        return subprocess.run([sys.executable, names.__file__, *map(str, paths)], capture_output=True, text=True)

    result = run(tmp_path)
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stdout.splitlines()] == [f"{tmp_path}/package/bad.py:2"] * 2
    assert "'found'" in result.stdout and "'kept'" in result.stdout
    assert run(tmp_path / "package" / "good.py").returncode == 0
    assert run(tmp_path / "none").returncode == 2


def test_this_project_binds_none(capsys):
    assert names.main([]) == 0, capsys.readouterr().out


def test_examples():
    assert doctest.testmod(names).failed == 0
