"""The library still prints the messages of the page on troubleshooting."""

import re

import pytest
from documentation.pages import DOCS
from documentation.reproductions import REPRODUCTIONS, message
from documentation.test_pages import expectation

PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### ([^\n]+)\n\n```text\n(.*?)```\n", PAGE, re.DOTALL | re.MULTILINE))


def test_every_entry_has_a_message_and_a_reproduction():
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert headings == list(ENTRIES) and set(headings) == set(REPRODUCTIONS) and len(headings) >= 25


@pytest.mark.parametrize("heading", REPRODUCTIONS)
def test_the_message_is_printed(heading, tmp_path, lenient):
    printed = message(heading, tmp_path)
    assert expectation(ENTRIES[heading]).fullmatch(printed), printed


@pytest.mark.parametrize("heading", ENTRIES)
def test_the_entry_has_a_cause_and_a_fix(heading):
    entry = PAGE.partition(f"### {heading}\n")[2].partition("\n##")[0]
    assert "**Cause.**" in entry and "**Fix.**" in entry
