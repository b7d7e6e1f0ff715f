"""Every notebook runs from top to bottom, and its two forms say the same."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=str)
def test_runs(notebook, monkeypatch):
    monkeypatch.setenv("QUICKSTART_FAST", "1")
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
    assert not any(cell.get("outputs") for cell in content.cells), "outputs are not kept"


def test_there_are_notebooks():
    assert Path("notebooks/quickstart.ipynb") in NOTEBOOKS
