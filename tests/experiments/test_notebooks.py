"""Every notebook runs from top to bottom, and its two forms say the same."""

import contextlib
import io
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

import lora_jax as lora

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_runs(notebook, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the tests' eight devices
    content = nbformat.read(ROOT / notebook, as_version=4)
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
    (stated,) = (cell.source for cell in content.cells if "Measured on 2 CPU cores" in cell.source)
    assert f"Measured on 2 CPU cores: {float(minutes):.0f} min, {memory} GB." in stated


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
    (cell, *_) = (cell for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code")
    log, programs, modules = tmp_path / "log", tmp_path / "programs", tmp_path / "modules"
    programs.mkdir()
    modules.mkdir()
    (programs / "git").write_text(GIT.format(python=sys.executable, log=str(log), root=str(ROOT)))
    (programs / "git").chmod(0o755)
    (modules / "pip.py").write_text("")
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
