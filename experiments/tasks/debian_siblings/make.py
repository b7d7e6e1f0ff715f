"""Generates this directory's data from debian_synopses.

python -m experiments.tasks.debian_siblings.make
"""

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments.tasks.debian_synopses.make import PART

SYSTEM = "Name the package in one line."
HEAD, TAIL = 12, 26
"""Parts of words of a description that are kept: from its beginning, and from its end, where siblings differ."""

ANSWER = 16
"""The largest number of parts of words of a synopsis."""

SPLITS = ("train", "validation", "test")
_HERE = Path(__file__).parent


def preferences(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a preference for each package with a sibling, another package of the same source, in the same order."""
    rows = list(rows)
    siblings = defaultdict(list)
    for row in rows:
        if len(PART.findall(_synopsis(row))) <= ANSWER:
            siblings[row["source"]].append(row)
    for row in rows:
        others = [other for other in siblings[row["source"]] if other is not row]
        if not others or row not in siblings[row["source"]]:
            continue
        other = others[int(hashlib.sha256(row["package"].encode()).hexdigest(), 16) % len(others)]
        prompt = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": shorten(row["messages"][1]["content"])},
        ]
        yield {
            "package": row["package"],
            "sibling": other["package"],
            "source": row["source"],
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": _synopsis(row)}],
            "rejected": [{"role": "assistant", "content": _synopsis(other)}],
        }


def shorten(description: str) -> str:
    """Returns the beginning and the end of a description.

    Example:
      >>> shorten(" ".join(f"w{i}" for i in range(30)))
      'w0 w1 w2 w3 w4 w5 … w22 w23 w24 w25 w26 w27 w28 w29'
    """
    words = description.split()
    sizes = [len(PART.findall(word)) for word in words]
    if sum(sizes) <= HEAD + TAIL:
        return " ".join(words)
    head = _count_within(sizes, HEAD)
    tail = _count_within(sizes[::-1], TAIL)
    return " ".join([*words[:head], "…", *words[len(words) - tail :]])


def _count_within(sizes: list[int], most: int) -> int:
    """Returns how many of the first sizes add up to at most a number."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if total > most:
            return count
    return len(sizes)


def _synopsis(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def main() -> None:
    """Writes all splits."""
    for split in SPLITS:
        with gzip.open(_HERE.parent / "debian_synopses" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = list(preferences(map(json.loads, file)))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (_HERE / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{split}: {len(rows):,} preferences")


if __name__ == "__main__":
    main()
