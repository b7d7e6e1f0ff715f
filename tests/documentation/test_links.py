"""Links within the documentation lead to files and headings that exist, and pages load nothing from other hosts."""

import re

import pytest
from documentation.pages import DOCS, PAGES, ROOT, included, name, prose

from lora_jax import paths

BUILT = {"notebooks"}
"""Folders of docs/ that a build makes."""


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST derive it."""
    text = re.sub(r"[`*\[\]]|\(.*?\)(?<=\))", "", heading) if "](" in heading else heading
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page) -> set[str]:
    text = "\n".join(map(prose, [page, *included(page)]))
    return {slug(match) for match in re.findall(r"^#{1,3} (.*)$", text, re.MULTILINE)}


def links(page):
    """Yields the targets of links, of images and of cards."""
    text = prose(page)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from (f"{target}.md" for target in re.findall(r"^:link: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_internal_links_exist(page):
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if path.parent == DOCS / "notebooks":  # copied from here by the build
            path = (ROOT / "notebooks" / path.name).with_suffix(".ipynb")
        assert path.exists(), f"{name(page)}: {link}"
        if anchor:
            assert anchor in anchors(path), f"{name(page)}: {link}; {paths.nearest(anchor, sorted(anchors(path)))}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_loaded_from_other_hosts(page):
    text = prose(page)
    assert not re.search(r"!\[[^\]]*\]\(\w+:|<(img|script|link|iframe)[^>]*(src|href)=[\"']\w+:", text)


def test_every_page_is_in_the_navigation():
    listed = set()
    for page in DOCS.rglob("*.md"):
        for toctree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in toctree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    pages = {page.resolve() for page in DOCS.rglob("*.md") if page.parent.name not in BUILT}
    assert pages - listed == {DOCS / "index.md"}
    assert {page for page in listed - pages if page.parent.name not in BUILT} == set()


def test_the_readme_leads_to_every_guide():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in (DOCS / "guides").glob("*.md") if f"docs/guides/{page.name}" not in text]
    assert missing in ([], ["adapters.md", "rules.md"], ["rules.md", "adapters.md"])
