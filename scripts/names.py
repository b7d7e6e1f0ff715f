"""Finds names that say how a value was obtained instead of what it is.

    python scripts/names.py [FILE_OR_DIRECTORY …]

Prints one line for each forbidden name that the code binds (variables, attributes, parameters, functions, classes,
imports) and exits with status 1 if there are any. Words in sentences and in strings are not checked.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FORBIDDEN = frozenset(
    ["entered", "found", "given", "into", "kept", "known", "made", "moving", "own", "place", "still", "taken", "told"]
)

ROOT = Path(__file__).resolve().parent.parent
CHECKED = ("lora_jax", "experiments", "tests", "scripts", "notebooks")


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (name, line) for every name that a module binds, including those of attributes and parameters.

    Example:
      >>> list(bound_names(ast.parse("import numpy as np; x.size = [n for n in range(3)]")))
      [('np', 1), ('size', 1), ('n', 1)]
    """
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, node.lineno
            case ast.MatchMapping(rest=str(name)):
                yield name, node.lineno
            case ast.alias(name=module, asname=alias):
                yield alias or module.split(".")[0], node.lineno


def forbidden_names(source: str) -> list[tuple[int, str]]:
    """Returns (line, name) of the forbidden names that a source text binds, in order.

    Underscores around a name do not matter: `_found` is `found`. Part of a longer name is allowed: `found_at`.

    Example:
      >>> forbidden_names("found = 1\\ndef size(self, _kept): return found_at(_kept)")
      [(1, 'found'), (2, '_kept')]
    """
    return sorted((line, name) for name, line in bound_names(ast.parse(source)) if name.strip("_") in FORBIDDEN)


def python_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def main(arguments: list[str]) -> int:
    paths = [Path(argument) for argument in arguments] or [ROOT / name for name in CHECKED]
    if missing := [str(path) for path in paths if not path.exists()]:
        print(f"No such file or directory: {', '.join(missing)}.", file=sys.stderr)
        return 2
    count = 0
    for file in (file for path in paths for file in python_files(path)):
        file = file.resolve()
        name = str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)
        for line, bound in forbidden_names(file.read_text(encoding="utf-8")):
            count += 1
            print(f"{name}:{line}: '{bound}' says how the value was obtained. Name it for what it is.")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
