"""scripts/check: its commands, who calls them, and what the project says about itself."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from contract.cases import LAYERS, RECIPES, allowed
from contract.conftest import quick_cases

import lora_jax as lora

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "scripts" / "check"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*args):
    return subprocess.run([str(CHECK), *args], capture_output=True, text=True)


def test_help_lists_the_commands():
    usage = run("--help")
    assert usage.returncode == 0
    commands = set(re.findall(r"^scripts/check (\w+)", usage.stdout, re.MULTILINE))
    assert commands == {"lint", "types", "tests", "newest", "oldest", "docs", "quick"}
    wrong = run("everything")
    assert wrong.returncode == 2 and wrong.stderr == usage.stdout


def test_what_newest_leaves_out_exists():
    (names,) = re.findall(r"^once=\((.*?)\)", CHECK.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name in names.split() if not (ROOT / "tests" / name).exists()] == []


def test_what_oldest_runs_exists():
    (names,) = re.findall(r"^parts=\((.*?)\)", CHECK.read_text(), re.MULTILINE | re.DOTALL)
    assert [name for name in names.split() if not (ROOT / name.partition("::")[0]).exists()] == []


def test_the_oldest_jax_is_stated():
    """The README states the range that the package declares."""
    (jax,) = [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("jax>=")]
    python = PROJECT["requires-python"].removeprefix(">=")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"JAX {jax.removeprefix('jax>=')} to the newest" in readme and f"Python {python} and later" in readme


def test_hooks_and_ci_run_the_script():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["entry"] for hook in hooks} == {f"scripts/check {name}" for name in ("lint", "types", "quick")}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    commands = {name: job["steps"][-1] for name, job in workflow["jobs"].items()}
    assert commands == {"check": {"run": "scripts/check"}, "site": {"run": "scripts/check docs"}}
    assert "scripts/check" in (ROOT / ".ci" / "run").read_text()


def test_the_citation_is_of_this_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lora.__version__ and citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


@pytest.mark.parametrize("transformation", ["plain", "grad"])
def test_the_quick_cases_have_every_layer_and_every_recipe(transformation):
    cases = [case for case in quick_cases() if case[-1] == transformation]
    layers = {layer for layer, recipe, _, _ in cases if recipe == "LoRA"}
    assert layers == {layer for layer in LAYERS if allowed(layer, "LoRA", "float32", transformation)}
    assert {recipe for _, recipe, _, _ in cases} == RECIPES.keys()
