"""Generates this directory's data from the package lists of a Debian machine.

    apt-get -o Acquire::Languages=en update
    (apt-cache dumpavail; /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_Translation-en*) |
        python -m experiments.tasks.debian_synopses.make

The same package lists yield the same lines in the same order.
"""

import gzip
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from experiments.tasks.debian_sections.make import stanzas

SYSTEM = "Summarize the software package that the user describes in one short line."
SPLITS = {"train": 0.8, "validation": 0.88, "test": 1.0}
"""Upper bounds of each split's range of hashes."""

SIZES = {"train": 5000, "validation": 500, "test": 800}
"""Number of examples of each split."""

PER_SOURCE = 4  # packages of one source
MIN_DESCRIPTION = 120  # characters
MAX_DESCRIPTION = 120  # parts of words: with the other messages, at most 256 tokens of common tokenizers
SYNOPSIS = range(12, 81)  # characters
PART = re.compile(r"[^\W\d_]{1,7}|[\d_]|[^\w\s]")
NOT_REAL = re.compile(r"transitional|dummy|metapackage|meta-package|meta package|debug|obsolete", re.IGNORECASE)
NOT_REAL_NAME = re.compile(r"-(dbg|dbgsym|debug)$")
ITEM = re.compile(r"[*+o-] +(?=\S)")
VERSION = re.compile(r"[-.]?\d[\d.]*")
SHARED = 0.5  # maximum share of word sequences that a held-out description shares with the training data
WORDS = 6  # length of those sequences


class Written(Protocol):
    """An example of a data set."""

    def line(self) -> str: ...


class Example(NamedTuple):
    """A package and its two descriptions."""

    package: str
    source: str
    description: str
    synopsis: str

    def line(self) -> str:
        """Returns the example as a line of JSON."""
        contents = {"system": SYSTEM, "user": self.description, "assistant": self.synopsis}
        messages = [{"role": role, "content": text} for role, text in contents.items()]
        row = {"package": self.package, "source": self.source, "messages": messages}
        return json.dumps(row, ensure_ascii=False) + "\n"


def examples(lines: Iterable[str]) -> list[Example]:
    """Returns packages with distinct descriptions and synopses, ordered by a hash of their names."""
    sources: dict[tuple[str, str], str] = {}
    texts: dict[tuple[str, str], tuple[str, str]] = {}
    for fields in stanzas(lines, continued=True):
        key = fields["Package"], fields.get("Description-md5", "")
        if "Filename" not in fields:  # from the list of translations
            synopsis, _, body = fields.get("Description-en", "").partition("\n")
            texts[key] = reflow(body), " ".join(synopsis.split())
        elif re.match(r"pool/(updates/)?main/", fields["Filename"]):
            sources[key] = fields.get("Source", fields["Package"]).split(" ")[0]
    packages = {
        name: Example(name, sources[name, md5], *texts[name, md5]) for name, md5 in sorted({*sources} & {*texts})
    }
    return list(_distinct(sorted(packages.values(), key=lambda example: _hash(example.package))))


def _distinct(packages: Iterable[Example]) -> Iterator[Example]:
    """Yields usable packages whose descriptions and synopses are new, at most `PER_SOURCE` of a source."""
    seen: set[str] = set()
    counts: dict[str, int] = defaultdict(int)
    for example in packages:
        letters = {re.sub(r"[\W\d_]+", "", text.casefold()) for text in (example.description, example.synopsis)}
        if usable(example) and not letters & seen and counts[stem(example.source)] < PER_SOURCE:
            seen |= letters
            counts[stem(example.source)] += 1
            yield example


def usable(example: Example) -> bool:
    """Whether a package is a real one, and its texts have suitable lengths."""
    return (
        len(example.description) >= MIN_DESCRIPTION
        and len(PART.findall(example.description)) <= MAX_DESCRIPTION
        and len(example.synopsis) in SYNOPSIS
        and not NOT_REAL_NAME.search(example.package)
        and not NOT_REAL.search(f"{example.synopsis} {example.description}")
    )


def reflow(body: str) -> str:
    """Converts the body of a description: each paragraph, item of a list and indented line becomes one line.

    Example:
      >>> reflow("A tool\\nthat does:\\n * one thing,\\n   well\\n.\\nIt is small.")
      'A tool that does:\\n- one thing, well\\nIt is small.'
    """
    lines: list[str] = []
    before = ""  # the kind of the last line
    for line in body.splitlines():
        text = " ".join(line.split())
        indented = line.startswith(" ")
        if text == ".":
            before = ""
        elif item := ITEM.match(text):
            lines.append(f"- {text[item.end() :]}")
            before = "item"
        elif (before, indented) in (("text", False), ("item", True)):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
            before = "indented" if indented else "text"
    return "\n".join(lines)


def stem(source: str) -> str:
    """Returns a source's name without versions: `gcc-11` and `gcc-12` have similar descriptions.

    Example:
      >>> stem("gcc-12"), stem("python3.11"), stem("lua5.4-posix")
      ('gcc', 'python', 'lua-posix')
    """
    return VERSION.sub("", source) or source


def split(source: str) -> str:
    """Returns the split of all packages of a source and of its other versions."""
    fraction = int.from_bytes(_hash(stem(source))[:8], "big") / 2**64
    return next(name for name, end in SPLITS.items() if fraction < end)


def divide(packages: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns the examples of each split, without held-out examples that resemble training examples.

    Sources are selected instead of packages, so that packages have their siblings in the data.
    """
    by_source = sorted(packages, key=lambda example: _hash(f"order {stem(example.source)}"))
    splits = {name: [example for example in by_source if split(example.source) == name] for name in SPLITS}
    train = splits["train"][: SIZES["train"]]
    common = {words for example in train for words in _sequences(example.description)}
    splits = {
        name: [e for e in splits[name] if name == "train" or _share(e.description, common) <= SHARED][:size]
        for name, size in SIZES.items()
    }
    order = {example: number for number, example in enumerate(packages)}
    return {name: sorted(selected, key=order.__getitem__) for name, selected in splits.items()}


def _sequences(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return list(zip(*(words[start:] for start in range(WORDS))))


def _share(text: str, common: set[tuple[str, ...]]) -> float:
    sequences = _sequences(text)
    return sum(words in common for words in sequences) / max(len(sequences), 1)


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def write(directory: Path, splits: Mapping[str, Sequence[Written]]) -> None:
    """Writes a compressed file for each split."""
    for name, packages in splits.items():
        text = "".join(example.line() for example in packages)
        (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{name}: {len(packages)} examples")


def main() -> None:
    """Reads the package lists from standard input and writes the data next to this file."""
    splits = divide(examples(sys.stdin))
    if short := [name for name, size in SIZES.items() if len(splits[name]) < size]:
        raise SystemExit(
            f"too few packages for {', '.join(short)}: run `apt-get -o Acquire::Languages=en update` first"
        )
    write(Path(__file__).parent, splits)


if __name__ == "__main__":
    main()
