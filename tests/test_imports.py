"""Imports point one way, and experiments import public names only.

No two files, and no two sub-packages, import each other in a cycle.

Every import counts, including those inside functions and under `TYPE_CHECKING`. `from package import name` imports the
file `package/name.py` if there is one, and `package/__init__.py` otherwise. Python also runs `a/__init__.py` before it
imports `a/b.py`. This implicit import does not count between files, because an `__init__.py` re-exports names from the
files beside it. It counts between sub-packages: each package is compared with the files and packages beside it as a
whole, whichever of its files is imported.

Public are the names in `lora_jax.__all__` and, for the modules among them, those in the module's `__all__`.
"""

import ast
import importlib
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import lora_jax

ROOT = Path(lora_jax.__file__).parents[1]

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


@pytest.mark.parametrize("root", ["lora_jax", "experiments"])
def test_files_do_not_import_each_other(root):
    cycle = cycle_in(file_graph(root))
    assert not cycle, "\n".join(cycle)


@pytest.mark.parametrize("root", ["lora_jax", "experiments"])
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


def is_public(dotted: str) -> bool:
    """Whether a dotted name is in the library's `__all__`, or in that of a public module of the library."""
    owner, *names = dotted.split(".")
    node = importlib.import_module(owner)
    for name in names:
        if not inspect.ismodule(node):
            return True  # an attribute of a public object
        if name not in getattr(node, "__all__", ()):
            return False
        node = getattr(node, name)
    return True


def uses_of(package: str, file: Path) -> Iterator[tuple[str, int]]:
    """The dotted names of a package that a file imports, or reads from what it imports, with line numbers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package:
                    aliases[alias.asname or package] = alias.name if alias.asname else package
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package and not node.level:
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node.lineno
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id in aliases:
            yield ".".join([aliases[inner.id], *reversed(names)]), node.lineno


def test_experiments_use_the_public_api():
    private = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in modules_of("experiments").values()
        for name, line in uses_of("lora_jax", file)
        if not is_public(name)
    ]
    assert not private, "Names that are not public:\n" + "\n".join(private)


def test_names_that_are_not_public_are_found(tmp_path):
    file = tmp_path / "study.py"
    file.write_text(
        "import lora_jax as lora\nfrom lora_jax import optim, spec\nfrom lora_jax.leaves import is_array\n"
        "lora.training.check_finite\nlora.nnx.functional(model).base\noptim.extra\nlora.LoRA.create\n"
        "def run():\n    from lora_jax.peft import Names, keys\n"
    )
    private = [name for name, _ in uses_of("lora_jax", file) if not is_public(name)]
    assert set(private) == {
        "lora_jax.spec",
        "lora_jax.leaves.is_array",
        "lora_jax.peft.keys",
        "lora_jax.training",
        "lora_jax.training.check_finite",
        "lora_jax.optim.extra",
    }
