"""Checks that a tag can be published: `python scripts/release.py v0.2.0`.

The tag, `lora_jax.__version__`, the citation and the first heading of the changelog must state one version, and the
heading its date. Prints a line for each disagreement and exits with status 1 if there are any.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

VERSIONS = {
    "lora_jax/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
    "CHANGELOG.md": r"^## (\S+)",
}
"""The pattern of the version in each file."""


def disagreements(tag: str, root: Path = ROOT) -> list[str]:
    """Returns a sentence for each file that does not state the version of the tag."""
    sentences = []
    for file, pattern in VERSIONS.items():
        match = re.search(pattern, (root / file).read_text(encoding="utf-8"), re.MULTILINE)
        version = match[1] if match else None
        if f"v{version}" != tag:
            sentences.append(f"{file} states the version {version}, and the tag is {tag}")
    heading = re.search(r"^## .*$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if heading is None or not re.fullmatch(r"## \S+ \(\d{4}-\d\d-\d\d\)", heading[0]):
        sentences.append(f"CHANGELOG.md: expected a heading '## {tag.removeprefix('v')} (year-month-day)'")
    return sentences


def main(arguments: list[str]) -> int:
    """Prints the disagreements, and returns the exit status."""
    if len(arguments) != 1:
        print("usage: python scripts/release.py TAG")
        return 2
    sentences = disagreements(arguments[0])
    print("\n".join(sentences))
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
