"""Generates this directory's data from the package lists of a Debian machine.

    apt-get update
    apt-cache dumpavail | python -m experiments.tasks.debian_tags.make

The same package lists yield the same lines in the same order.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.tasks.debian_fields.make import tags
from experiments.tasks.debian_sections.make import stanzas
from experiments.tasks.debian_synopses.make import NOT_REAL, NOT_REAL_NAME, PER_SOURCE, SYNOPSIS, split, stem, write

SYSTEM = "Describe the software package that has these tags in one short line."
SIZES = {"train": 2500, "validation": 200, "test": 400}
"""Number of examples of each split."""

FACETS = range(4, 9)  # of a package


class Example(NamedTuple):
    """A package, its tags and its synopsis."""

    package: str
    source: str
    tags: str
    synopsis: str

    def line(self) -> str:
        """Returns the example as a line of JSON."""
        contents = {"system": SYSTEM, "user": self.tags, "assistant": self.synopsis}
        messages = [{"role": role, "content": text} for role, text in contents.items()]
        row = {"package": self.package, "source": self.source, "messages": messages}
        return json.dumps(row, ensure_ascii=False) + "\n"


def meaning(name: str, facets: Mapping[str, frozenset[str]]) -> str:
    """Returns name and tags of a package as one line.

    Example:
      >>> meaning("chess", {"use": frozenset({"gameplaying"}), "interface": frozenset({"x11", "graphical"})})
      'name: chess; interface: graphical, x11; use: gameplaying'
    """
    parts = [f"name: {name}", *(f"{facet}: {', '.join(sorted(values))}" for facet, values in sorted(facets.items()))]
    return "; ".join(parts)


def examples(lines: Iterable[str]) -> list[Example]:
    """Returns packages with distinct synopses, ordered by a hash of their names."""
    packages: dict[str, Example] = {}
    for fields in stanzas(lines, continued=True):
        name, facets = fields["Package"], tags(fields)
        synopsis = " ".join(fields.get("Description", "").partition("\n")[0].split())
        usable = len(synopsis) in SYNOPSIS and not NOT_REAL.search(synopsis) and not NOT_REAL_NAME.search(name)
        if usable and len(facets) in FACETS:
            source = fields.get("Source", name).split(" ")[0]
            packages[name] = Example(name, source, meaning(name, facets), synopsis)
    seen: set[str] = set()
    counts: dict[str, int] = defaultdict(int)
    result = []
    for example in sorted(packages.values(), key=lambda example: hashlib.sha256(example.package.encode()).digest()):
        letters = re.sub(r"[\W\d_]+", "", example.synopsis.casefold())
        if letters not in seen and counts[stem(example.source)] < PER_SOURCE:
            seen.add(letters)
            counts[stem(example.source)] += 1
            result.append(example)
    return result


def divide(packages: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns the first examples of each split."""
    return {
        name: [example for example in packages if split(example.source) == name][:size] for name, size in SIZES.items()
    }


def main() -> None:
    """Reads the output of `apt-cache dumpavail` from standard input and writes the data next to this file."""
    splits = divide(examples(sys.stdin))
    if short := [name for name, size in SIZES.items() if len(splits[name]) < size]:
        raise SystemExit(f"too few packages for {', '.join(short)}: run `apt-get update` first")
    write(Path(__file__).parent, splits)


if __name__ == "__main__":
    main()
