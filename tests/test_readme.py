"""The README is short, and says how to run what exists. Its blocks are executed by tests/documentation."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 90
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 12


def test_ci_calls_the_test_command():
    needs, study, tests = (line.split("  #")[0].strip() for line in blocks("bash")[0].splitlines())
    assert needs.startswith("# needs") and study.endswith("experiments.run quickstart")
    assert tests in (README.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_the_example_runs(lenient):
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["params"]["head"]["kernel"].shape == (128, 3) and float(names["metrics"]["loss"]) > 0
