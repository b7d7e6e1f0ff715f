"""The README's example runs, and its commands are the ones that exist."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_runs(lenient):
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert float(names["metrics"]["loss"]) > 0
    merged, base = names["merged"], names["base"]
    assert (np.asarray(merged["hidden"]["kernel"]) != np.asarray(base["hidden"]["kernel"])).any()


def test_ci_calls_the_test_command():
    command = blocks("bash")[0].splitlines()[1].split("#")[0].strip()
    assert command in (README.parent / ".ci" / "run").read_text()
