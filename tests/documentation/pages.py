"""The pages of the documentation, and the blocks in them."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^(?P<fence>```+|:::+)(?P<info>[^\n`]*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      language: 'python', 'bash', 'text', …; '' for one without.
      text: Its lines.
      line: The number of its first line in the page.
      adjacent: Whether only blank lines lie between this block and the one before.
    """

    language: str
    text: str
    line: int
    adjacent: bool

    @property
    def needs(self) -> str | None:
        """What a block of commands needs that a test does not have, by its first line; None if nothing."""
        first = self.text.partition("\n")[0]
        return first.removeprefix("# needs ") if first.startswith("# needs ") else None


def name(page: Path) -> str:
    """The path of a page within the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of code of a page. Fences of directives (in braces) are not code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start, fence, language, after_block, adjacent = 0, "", "", False, False
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if fence:
            if line.rstrip() == fence:
                if fence.startswith("`") and not language.startswith("{"):
                    yield Block(language, "\n".join(lines[start : number - 1]) + "\n", start + 1, adjacent)
                    after_block = True
                fence = ""
        elif match and match["fence"].startswith("`"):
            start, fence, language, adjacent = number, match["fence"], match["info"].strip(), after_block
        elif line.strip():
            after_block = False


def included(page: Path) -> Iterator[Path]:
    """Yields the pages that a page includes."""
    for target in re.findall(r"^```+\{include\} (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield (page.parent / target).resolve()


def prose(page: Path) -> str:
    """The page without its fenced blocks of code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^(```+)[^\n`{]*\n.*?^\1\n", "", text, flags=re.DOTALL | re.MULTILINE)
