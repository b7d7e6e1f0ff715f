"""Generates this directory's data from the package lists of a Debian machine.

    apt-get update
    apt-cache dumpavail | python -m experiments.tasks.debian_sections.make

The same package lists yield the same lines in the same order.
"""

import gzip
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SECTIONS = frozenset(
    {
        "admin",
        "database",
        "editors",
        "electronics",
        "fonts",
        "games",
        "graphics",
        "hamradio",
        "kernel",
        "mail",
    }
    | {"math", "net", "science", "sound", "text", "vcs", "video", "web", "x11"}
)
SPLITS = {"train": 0.65, "validation": 0.80, "test": 1.0}  # upper bounds of each split's range of hashes
NOT_TOPICAL = re.compile(r"^lib(?!reoffice)|-(dev|docs?|data|dbg|dbgsym)$")  # libraries and accompanying packages


class Example(NamedTuple):
    """One line of the data: the label, its origin, and the text."""

    section: str
    source: str
    package: str
    synopsis: str


def stanzas(lines: Iterable[str], *, continued: bool = False) -> Iterator[dict[str, str]]:
    """Yields the fields of each paragraph of a Debian control file: their first lines, or all lines (`continued`)."""
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if not line.strip():
            if fields:
                yield fields
            fields = {}
        elif not line[0].isspace():
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        elif continued:
            fields[name] += f"\n{line[1:].rstrip()}"
    if fields:
        yield fields


def examples(lines: Iterable[str]) -> list[Example]:
    """Returns topical packages with distinct synopses, ordered by a hash of their names."""
    by_text: dict[str, Example] = {}
    sections: dict[str, set[str]] = {}
    packages = [s for s in stanzas(lines) if s.get("Section") in SECTIONS and not NOT_TOPICAL.search(s["Package"])]
    for fields in sorted(packages, key=lambda fields: fields["Package"]):
        synopsis = " ".join(fields.get("Description", "").split())
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        if synopsis:
            sections.setdefault(synopsis.casefold(), set()).add(fields["Section"])
            example = Example(fields["Section"], source, fields["Package"], synopsis)
            by_text.setdefault(synopsis.casefold(), example)
    unambiguous = [example for text, example in by_text.items() if len(sections[text]) == 1]
    return sorted(unambiguous, key=lambda example: hashlib.sha256(example.package.encode()).digest())


def split(source: str) -> str:
    """Returns the split of all packages that are built from `source`, so that related packages share a split."""
    fraction = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") / 2**64
    return next(name for name, end in SPLITS.items() if fraction < end)


def write(directory: Path, packages: list[Example]) -> None:
    """Writes `labels.txt` and a compressed table for each split."""
    (directory / "labels.txt").write_text("\n".join(sorted(SECTIONS)) + "\n", encoding="utf-8")
    for name in SPLITS:
        rows = [Example._fields, *(example for example in packages if split(example.source) == name)]
        text = "".join("\t".join(row) + "\n" for row in rows)
        (directory / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{name}: {len(rows) - 1} examples")


def main() -> None:
    """Reads the output of `apt-cache dumpavail` from standard input and writes the data next to this file."""
    packages = examples(sys.stdin)
    if missing := SECTIONS - {example.section for example in packages}:
        raise SystemExit(f"no package of {', '.join(sorted(missing))}: run `apt-get update` first")
    write(Path(__file__).parent, packages)
    for section, count in Counter(example.section for example in packages).most_common():
        print(f"{count:6} {section}")


if __name__ == "__main__":
    main()
