"""The wheel and the source distribution: what they contain, and that the wheel works without this directory."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lora_jax as lora
from lora_jax.commands import machine

ROOT = Path(lora.__file__).parents[1]
FIRST_PAGE = ROOT / "docs" / "index.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def uv(*args):
    program = os.environ.get("UV") or shutil.which("uv")
    assert program, "These tests need uv: pip install uv"
    return subprocess.run([program, *map(str, args)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution."""
    directory = tmp_path_factory.mktemp("dist")
    uv("build", "--quiet", ROOT, "--out-dir", directory)
    (wheel,), (source,) = directory.glob("*.whl"), directory.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def metadata(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_string(wheel.read(name).decode())


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """The directory of a new environment that has the wheel and what it needs."""
    directory = tmp_path_factory.mktemp("environment")
    uv("venv", "--quiet", "--python", sys.executable, directory / "env")
    python = directory / "env" / "bin" / "python"
    uv("pip", "install", "--quiet", "--python", python, distributions[0])
    return directory


def run(environment, program, *args):
    """Runs a program of the environment, outside of this directory and without the variables of the tests."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL", "XLA"))}
    command = [environment / "env" / "bin" / program, *args]
    return subprocess.run(command, cwd=environment, env=variables, capture_output=True, text=True)


def test_the_wheel_has_the_package_alone(distributions):
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"lora_jax", f"lora_jax-{lora.__version__}.dist-info"}
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "lora_jax").rglob("*.py")}
    assert {name for name in names if name.startswith("lora_jax/")} == modules | {"lora_jax/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_has_no_experiments(distributions):
    with tarfile.open(distributions[1]) as source:
        names = {name.split("/")[1] for name in source.getnames()}
    assert names == {
        ".gitignore",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "lora_jax",
        "pyproject.toml",
    }


def test_the_metadata(metadata):
    assert metadata["Version"] == lora.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == {"tpu", "cuda", "gguf"} == machine.EXTRAS.keys()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    assert {re.match(r"[\w-]+", line)[0] for line in required} == set(machine.PACKAGES)
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_the_description_is_the_readme_with_absolute_links(metadata):
    text, readme = metadata.get_payload(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown"
    code = re.compile(r"```.*?```", re.DOTALL)
    assert code.findall(text) == code.findall(readme)
    links = re.findall(r"\]\(([^)\s]+)|\b(?:src|srcset|href)=\"([^\"]+)", code.sub("", text))
    assert [link for match in links if not re.match(r"https?://|#|mailto:", link := "".join(match))] == []


def test_the_first_example_runs_from_the_wheel(environment):
    example = "\n".join(re.findall(r"```python\n(.*?)```", FIRST_PAGE.read_text(encoding="utf-8"), re.DOTALL))
    check = "\nimport pathlib, sys\nassert pathlib.Path(lora.__file__).is_relative_to(sys.prefix), lora.__file__\n"
    result = run(environment, "python", "-W", "error", "-c", example + check)
    assert result.returncode == 0, result.stderr


def test_the_command_line_runs_from_the_wheel(environment):
    assert run(environment, "lora-jax", "--version").stdout == f"lora-jax {lora.__version__}\n"
    report = run(environment, "lora-jax", "doctor")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "gguf: not installed" in report.stdout and "problem" not in report.stdout and report.stderr == ""
