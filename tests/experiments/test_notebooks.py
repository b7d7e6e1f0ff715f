"""Every notebook runs from top to bottom, and its two forms say the same."""

import contextlib
import importlib.metadata
import io
import math
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lora_jax as lora

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


HIDE = """
import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
"""Makes modules as if they were not installed."""


def with_dependencies(*requirements: str) -> set[str]:
    """The names of distributions, and of all that they need."""
    names, rest, visited = set(), list(map(Requirement, requirements)), set()
    while rest:
        requirement = rest.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        if (name, frozenset(extras)) in visited:
            continue
        visited.add((name, frozenset(extras)))
        names.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another system
            needed = map(Requirement, importlib.metadata.requires(name) or ())
            rest += [
                one
                for one in needed
                if not one.marker or any(one.marker.evaluate({"extra": extra}) for extra in extras)
            ]
    return names


def not_installed_by(cell) -> set[str]:
    """The modules of this environment that neither the first cell of a notebook installs nor a kernel needs."""
    names = with_dependencies("ipykernel")
    for options, words in re.findall(r"pip install -q (--no-deps )?(.*)\"\)", cell.source):
        words = words.replace("./{SOURCE}", "lora-jax").replace("{extras}", "").replace("'", "").split()
        names |= set(words) if options else with_dependencies(*words)
    owners = importlib.metadata.packages_distributions()
    return {module for module, among in owners.items() if not names & set(map(canonicalize_name, among))}


def first_cell(notebook):
    return next(cell for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_runs_with_what_its_first_cell_installs(notebook, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' eight devices
    content = nbformat.read(ROOT / notebook, as_version=4)
    hidden = not_installed_by(first_cell(notebook))
    assert {"pytest", "orbax"} & hidden == {"pytest"}
    content.cells.insert(0, nbformat.v4.new_code_cell(HIDE.format(hidden=hidden)))
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_text_form_is_in_step(notebook):
    text = jupytext.read(ROOT / notebook.with_suffix(".py"))
    content = nbformat.read(ROOT / notebook, as_version=4)
    hint = f"run: jupytext --sync {notebook}"
    assert [(cell.cell_type, cell.source) for cell in content.cells] == [
        (cell.cell_type, cell.source) for cell in text.cells
    ], hint


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_outputs_are_those_of_a_full_run(notebook):
    content = nbformat.read(ROOT / notebook, as_version=4)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert len(code) <= 15
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run: scripts/notebooks.py"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    assert drawn >= sum("plt.show()" in cell.source for cell in code)
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    (minutes, memory) = re.findall(r"^([\d.]+) minutes and ([\d.]+) GB of memory", text, re.MULTILINE)[-1]
    (stated,) = (cell.source for cell in content.cells if "2 CPU cores, measured" in cell.source)
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \|" + r" (\S+)(?: GB)? \|" * 4, stated, re.MULTILINE)}
    here, colab, *accelerators = map(int, rows["minutes"])
    assert (here, colab) == (round(float(minutes)), math.ceil(1.7 * float(minutes)))
    assert "take 1.7 times as long" in stated and max(accelerators) <= colab
    sizes = r"arrays take at most ([\d.]+) GB \(.+?\), and the temporaries of the largest step ([\d.]+) GB"
    (device,) = re.findall(sizes, " ".join(stated.split()))
    assert rows["memory"] == (memory, memory, *[f"{sum(map(float, device)):.1f}"] * 2)


GIT = """#!{python}
import shutil, sys
from pathlib import Path
target = Path(sys.argv[-1])
assert not target.exists(), "fatal: destination path already exists"
with open({log!r}, "a") as log:
    log.write("clone\\n")
target.mkdir()
for name in ("experiments", "lora_jax"):
    (target / name).symlink_to(Path({root!r}) / name)
"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_the_first_cell_survives_a_restart_of_the_kernel(notebook, tmp_path):
    cell = first_cell(notebook)
    log, programs, modules = tmp_path / "log", tmp_path / "programs", tmp_path / "modules"
    programs.mkdir()
    modules.mkdir()
    (programs / "git").write_text(GIT.format(python=sys.executable, log=str(log), root=str(ROOT)))
    (programs / "git").chmod(0o755)
    (modules / "pip.py").write_text(f"import sys\nprint(*sys.argv[1:], file=open({str(tmp_path / 'pip')!r}, 'a'))")
    (modules / "jax_cuda12_plugin").mkdir()  # as on a machine with a GPU
    packages = sysconfig.get_path("purelib")
    # -S: what is installed is importable, this checkout is not
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{modules}:{packages}"}
    for _ in range(2):
        command = [
            sys.executable,
            "-S",
            "-c",
            cell.source + "\nimport experiments, lora_jax\nprint(experiments.__name__, lora_jax.__name__)",
        ]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "experiments lora_jax\n"), done.stderr
    assert log.read_text() == "clone\n"
    # The tests may have libtpu beside the plugin.
    assert re.match(r"install -q \./lora_jax_source(\[gguf\])? jax\[(tpu,)?cuda12\] ", (tmp_path / "pip").read_text())


def test_explain_shows_what_the_text_mentions(monkeypatch):
    (cell,) = (
        cell
        for cell in nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4).cells
        if cell.cell_type == "code" and "lora.explain" in cell.source
    )
    base = {f"layers/{i}/attention/{name}": {"kernel": jnp.eye(4)} for i in (0, 1) for name in ("query", "value")}

    def apply_fn(params, x):
        for name in base:
            x = x @ params[name]["kernel"]
        return x

    batch = (jnp.ones((1, 4)),)
    delta = lora.init(jax.random.key(0), base, {"attention": lora.LoRA(2)}, apply_fn, *batch)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(cell.source, {"lora": lora, "apply_fn": apply_fn, "base": base, "delta": delta, "batch": batch})
    lines = output.getvalue().splitlines()
    assert [line.split("/")[3] for line in lines] == ["query", "value"] and "factored" in lines[0]


def test_there_are_notebooks():
    assert Path("notebooks/quickstart.ipynb") in NOTEBOOKS
