#!/usr/bin/env python
"""Runs notebooks in full, one after another, and stores them with their outputs: scripts/notebooks.py [NAME ...]

It needs the project's environment (`uv run scripts/notebooks.py`). The cells are those of the text form,
notebooks/NAME.py. The last cell of each notebook prints the minutes and the memory that the run took.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


def run(name: str) -> None:
    """Executes one notebook from top to bottom and stores it with its outputs."""
    path = NOTEBOOKS / f"{name}.ipynb"
    content = jupytext.read(path.with_suffix(".py"))
    start = time.perf_counter()
    NotebookClient(content, timeout=3600, coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}).execute()
    for number, cell in enumerate(content.cells):
        cell["id"] = f"cell-{number}"  # the same in every run
        cell.metadata.pop("execution", None)  # the hours
    content.metadata.pop("language_info", None)
    jupytext.write(content, path)
    print(f"{path.relative_to(ROOT)}: {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)


def main(names: list[str]) -> int:
    """Runs the notebooks of these names, or all, and returns the exit status."""
    available = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    if names and names[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if unknown := sorted(set(names) - set(available)):
        print(f"error: no notebook {', '.join(unknown)}; there are {', '.join(available)}", file=sys.stderr)
        return 2
    os.environ.pop("NOTEBOOK_FAST", None)
    os.environ.pop("XLA_FLAGS", None)
    os.environ.pop("MPLBACKEND", None)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the stored outputs are those of a CPU
    for name in names or available:
        try:
            run(name)
        except CellExecutionError as error:
            print(f"error: notebooks/{name}.py: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
