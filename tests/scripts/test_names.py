"""The check of names finds every way in which Python binds one, and nothing else."""

import doctest

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


def test_the_command_names_file_line_and_name(tmp_path, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "good.py").write_text("size = 1\n")
    (tmp_path / "package" / "bad.py").write_text("size = 1\nfound = kept = 2\n")
    assert names.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/package/bad.py:2"] * 2
    assert "'found'" in lines[0] and "'kept'" in lines[1]
    assert names.main([str(tmp_path / "package" / "good.py")]) == 0
    assert names.main([str(tmp_path / "none")]) == 2


def test_the_whole_project_is_checked():
    """That it binds none of the names is what `scripts/check lint` says; the tests do not repeat it."""
    files = {
        names.ROOT / name for name in ("lora_jax/__init__.py", "experiments/run.py", "tests/conftest.py", __file__)
    }
    assert files <= {file for name in names.CHECKED for file in names.python_files(names.ROOT / name)}


def test_examples():
    assert doctest.testmod(names).failed == 0
