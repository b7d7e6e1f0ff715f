"""Generates this directory's data from the package lists of a Debian machine.

    apt-get update
    apt-cache dumpavail | python -m experiments.tasks.debian_fields.make

The same package lists yield the same lines in the same order.
"""

import gzip
import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.tasks.debian_sections.make import NOT_TOPICAL, SECTIONS, SPLITS, stanzas
from experiments.tasks.debian_sections.make import split as split_of
from experiments.tasks.debian_synopses.make import NOT_REAL, stem

SIZES = {"train": 1200, "validation": 200, "test": 400}
"""Number of examples of each task by split."""

RAREST = 50  # packages of a label
_LANGUAGES = frozenset(
    {"golang", "gnu-r", "haskell", "java", "javascript", "lisp", "ocaml", "perl", "php", "python", "ruby", "rust"}
)
"""Sections of libraries of a language."""

Fields = Mapping[str, str]


class Package(NamedTuple):
    """A synopsis, its origin, and its label by task."""

    source: str
    package: str
    synopsis: str
    labels: dict[str, str]


def tags(fields: Fields) -> dict[str, frozenset[str]]:
    """Returns the values of each facet of a package's tags.

    Example:
      >>> sorted(tags({"Tag": "role::program, interface::graphical,\\ninterface::x11"})["interface"])
      ['graphical', 'x11']
    """
    values: dict[str, set[str]] = defaultdict(set)
    for tag in fields.get("Tag", "").split(","):
        facet, _, value = tag.strip().partition("::")
        if value and value != "TODO":  # debtags has works-with::TODO for packages that are not tagged yet
            values[facet].add(value)
    return {facet: frozenset(by_facet) for facet, by_facet in values.items()}


def _section(fields: Fields) -> str:
    section = fields.get("Section", "")
    return section if section in SECTIONS and not NOT_TOPICAL.search(fields["Package"]) else ""


def _language(fields: Fields) -> str:
    section = fields.get("Section", "")
    return section if section in _LANGUAGES else ""


def _architecture(fields: Fields) -> str:
    return "independent" if fields.get("Architecture") == "all" else "dependent"


def _facet(name: str, *ignored: str) -> Callable[[Fields], str]:
    """Returns a function to the only value of a facet; empty if there are none or several."""

    def value(fields: Fields) -> str:
        values = tags(fields).get(name, frozenset()) - {*ignored}
        return next(iter(values)) if len(values) == 1 else ""

    return value


TASKS: dict[str, Callable[[Fields], str]] = {
    "section": _section,
    "language": _language,
    "role": _facet("role"),
    "interface": _facet("interface", "x11", "3d"),  # beside graphical
    "uitoolkit": _facet("uitoolkit", "xlib"),  # beside the toolkits that use it
    "use": _facet("use"),
    "works-with": _facet("works-with"),
    "architecture": _architecture,
}
"""Functions from the fields of a package to its label; empty without one."""


def packages(lines: Iterable[str]) -> list[Package]:
    """Returns packages with distinct synopses, ordered by a hash of their names; a label that differs between the
    packages of a synopsis, or that is rare, is empty.
    """
    by_text: dict[str, Package] = {}
    values: dict[str, dict[str, set[str]]] = {}
    for fields in sorted(stanzas(lines, continued=True), key=lambda fields: fields["Package"]):
        synopsis = " ".join(fields.get("Description", "").partition("\n")[0].split())
        text = synopsis.casefold()
        if synopsis and not NOT_REAL.search(synopsis):
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            by_text.setdefault(text, Package(source, fields["Package"], synopsis, {}))
            labels = values.setdefault(text, {task: set() for task in TASKS})
            for task, label in TASKS.items():
                labels[task].add(label(fields))
    for text, package in by_text.items():
        unique = {task: next(iter(labels)) for task, labels in values[text].items() if len(labels) == 1}
        package.labels.update({task: label for task, label in unique.items() if label})
    frequent = {task: _frequent(task, by_text.values()) for task in TASKS}
    for package in by_text.values():
        for task in [task for task, label in package.labels.items() if label not in frequent[task]]:
            del package.labels[task]
    return sorted(by_text.values(), key=lambda package: hashlib.sha256(package.package.encode()).digest())


def _frequent(task: str, group: Iterable[Package]) -> set[str]:
    labels = [package.labels.get(task, "") for package in group]
    return {label for label in set(labels) - {""} if labels.count(label) >= RAREST}


def divide(group: Sequence[Package], sizes: Mapping[str, int]) -> dict[str, list[Package]]:
    """Returns the packages of each split, with the labels of each task's first examples."""
    splits: dict[str, list[Package]] = {name: [] for name in SPLITS}
    counts = {name: dict.fromkeys(TASKS, 0) for name in SPLITS}
    for package in group:
        name = split_of(stem(package.source))
        labels = {task: label for task, label in package.labels.items() if counts[name][task] < sizes[name]}
        for task in labels:
            counts[name][task] += 1
        if labels:
            splits[name].append(package._replace(labels=labels))
    return splits


def write(directory: Path, splits: Mapping[str, Sequence[Package]]) -> None:
    """Writes a compressed table for each split: a column for each task, which is empty without a label."""
    for name, group in splits.items():
        rows = [(*TASKS, "source", "package", "synopsis")]
        rows += [(*(p.labels.get(task, "") for task in TASKS), p.source, p.package, p.synopsis) for p in group]
        text = "".join("\t".join(row) + "\n" for row in rows)
        (directory / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        counts = ", ".join(f"{sum(task in p.labels for p in group)} {task}" for task in TASKS)
        print(f"{name}: {len(group)} packages; {counts}")


def main() -> None:
    """Reads the output of `apt-cache dumpavail` from standard input and writes the data next to this file."""
    splits = divide(packages(sys.stdin), SIZES)
    for name, group in splits.items():
        short = [task for task in TASKS if sum(task in package.labels for package in group) < SIZES[name]]
        if short:
            raise SystemExit(f"too few packages of {', '.join(short)}: run `apt-get update` first")
    write(Path(__file__).parent, splits)


if __name__ == "__main__":
    main()
