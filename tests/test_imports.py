"""Imports point one way: no two files, and no two sub-packages, import each other in a cycle.

Every import counts, including those inside functions and under `TYPE_CHECKING`. `from package import name` imports the
file `package/name.py` if there is one, and `package/__init__.py` otherwise. Python also runs `a/__init__.py` before it
imports `a/b.py`. This implicit import does not count between files, because an `__init__.py` re-exports names from the
files beside it. It counts between sub-packages: each package is compared with the files and packages beside it as a
whole, whichever of its files is imported.
"""

import ast
import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(importlib.import_module("lora_jax").__file__).parents[1]

Graph = dict[str, dict[str, str]]
"""`{importer: {imported: "file:line"}}`."""


def modules_of(root: str) -> dict[str, Path]:
    """The modules of a package by dotted name."""
    modules = {}
    for file in sorted((ROOT / root).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imports_of(name: str, file: Path, modules: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, with line numbers."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(part for part in (parent if node.level else "", node.module) if part)
            for alias in node.names:
                child = f"{source}.{alias.name}"
                yield (child if child in modules else source), node.lineno


def file_graph(root: str) -> Graph:
    modules = modules_of(root)
    graph: Graph = {name: {} for name in modules}
    for name, file in modules.items():
        for imported, line in imports_of(name, file, modules):
            if imported in modules and imported != name:
                graph[name].setdefault(imported, f"{file.relative_to(ROOT)}:{line}")
    return graph


def package_graphs(graph: Graph) -> Iterator[Graph]:
    """For each package, the graph of the files and packages directly in it."""
    for package in sorted({name.rpartition(".")[0] for name in graph} - {""}):
        children: Graph = {}
        depth = package.count(".") + 2
        for name, imports in graph.items():
            if not name.startswith(f"{package}."):
                continue
            child = ".".join(name.split(".")[:depth])
            children.setdefault(child, {})
            for imported, location in imports.items():
                other = ".".join(imported.split(".")[:depth])
                if imported.startswith(f"{package}.") and other != child:
                    children[child].setdefault(other, location)
        yield children


def cycle_in(graph: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The lines of one shortest import cycle; empty if there is none."""
    cycles = []
    for start in graph:
        previous: dict[str, str] = {}
        queue = [start]
        for name in queue:  # breadth first; grows meanwhile
            for imported in graph[name]:
                if imported not in previous:
                    previous[imported] = name
                    queue.append(imported)
        if start in previous:
            path = [start]
            while (name := previous[path[-1]]) != start:
                path.append(name)
            cycles.append([start, *reversed(path[1:]), start])
    if not cycles:
        return []
    shortest = min(cycles, key=len)
    return [f"{one} imports {other} ({graph[one][other]})" for one, other in itertools.pairwise(shortest)]


@pytest.mark.parametrize("root", ["lora_jax"])
def test_files_do_not_import_each_other(root):
    cycle = cycle_in(file_graph(root))
    assert not cycle, "\n".join(cycle)


@pytest.mark.parametrize("root", ["lora_jax"])
def test_packages_do_not_import_each_other(root):
    for graph in package_graphs(file_graph(root)):
        cycle = cycle_in(graph)
        assert not cycle, "\n".join(cycle)


def test_cycles_are_found_and_shown():
    graph = {"a": {"b": "a.py:1"}, "b": {"c": "b.py:2"}, "c": {"b": "c.py:3"}, "d": {"a": "d.py:4"}}
    assert cycle_in(graph) == ["b imports c (b.py:2)", "c imports b (c.py:3)"]
    assert cycle_in({"a": {"b": "a.py:1"}, "b": {}}) == []


def test_packages_are_compared_as_a_whole():
    graph: Graph = {"p": {}, "p.q.x": {"p.r": "x:1"}, "p.q.y": {}, "p.r": {"p.q.y": "r:2"}, "p.q": {"p.q.x": "q:3"}}
    assert cycle_in(graph) == []
    assert [cycle_in(children) for children in package_graphs(graph)] == [
        ["p.q imports p.r (x:1)", "p.r imports p.q (r:2)"],
        [],
    ]


def test_imports_inside_functions_and_type_checks_count(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from p import b\n\n\n"
        "def f():\n    import p.c\n    from ..d import name\n    from . import e\n"
    )
    imported = [name for name, _ in imports_of("p.q.a", file, {"p.b", "p.c", "p.d", "p.q.e"})]
    assert sorted(imported) == ["p.b", "p.c", "p.d", "p.q.e"]
