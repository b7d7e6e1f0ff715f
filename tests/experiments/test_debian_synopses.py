"""The shipped descriptions and synopses, and the script that makes them."""

import doctest
import re

import pytest

from experiments.input import sources
from experiments.tasks import examples
from experiments.tasks.debian_synopses import make

ABOUT = "It plays chess against you on the terminal, with a clock, several levels and an opening book of many games"


def stanzas(name, source, synopsis, body, number=0):
    """The entries of one package in both lists."""
    listed = f"Package: {name}\nSource: {source} (1.0)\nFilename: pool/main/{name}.deb\nDescription-md5: {number}\n\n"
    return listed + f"Package: {name}\nDescription-md5: {number}\nDescription-en: {synopsis}\n {body}\n\n"


PACKAGES = (
    stanzas("chess", "chess", "terminal chess game", f"{ABOUT}.\n .\n It is free.")
    + stanzas("chess-2", "chess2", "Terminal chess game, 2", f"{ABOUT} in its version 2.")
    + stanzas("chess-copy", "chess", "another line about chess", f"{ABOUT}. It is free.")
    + stanzas("chess-dbg", "chess", "chess with symbols", f"{ABOUT} and symbols.")
    + stanzas("chess-old", "chess", "transitional package for chess", f"{ABOUT} until it is removed.")
    + stanzas("tiny", "tiny", "a small package", "Too short.")
    + stanzas("chess-book", "chess", "opening book of chess", f"{ABOUT}.\n This package has the book.")
)


@pytest.fixture(scope="module")
def shipped():
    return {split: sources.read(f"debian_synopses:{split}", split) for split in make.SIZES}


def test_what_the_script_leaves_out():
    packages = make.examples(PACKAGES.splitlines(keepends=True))
    assert {example.package for example in packages} <= {"chess", "chess-2", "chess-copy", "chess-book"}
    assert {"chess", "chess-copy"} - {example.package for example in packages}  # one of two equal descriptions
    (book,) = [example for example in packages if example.package == "chess-book"]
    assert book.source == "chess" and book.description == f"{ABOUT}. This package has the book."
    assert {make.split(source) for source in ("gcc-11", "gcc-12", "gcc")} == {make.split("gcc")}


def test_the_order_of_the_lists_does_not_matter():
    blocks = PACKAGES.strip().split("\n\n")
    other = "\n\n".join(reversed(blocks)).splitlines(keepends=True)
    assert make.examples(other) == make.examples(PACKAGES.splitlines(keepends=True))


def test_the_shipped_files(shipped):
    directory = examples.SHIPPED["debian_synopses"]
    assert sum(path.stat().st_size for path in directory.glob("*.gz")) < 2e6
    words = {}
    for split, records in shipped.items():
        assert len(records) == make.SIZES[split]
        rows = [records.sources[0]._rows[i] for i in range(len(records))]
        assert {make.split(row["source"]) for row in rows} == {split}
        assert all(row["package"] and make.NOT_REAL.search(str(row["messages"])) is None for row in rows)
        roles = {tuple(message["role"] for message in row["messages"]) for row in rows}
        assert roles == {("system", "user", "assistant")}
        words[split] = {match for row in rows for match in make._sequences(row["messages"][1]["content"])}
        if split != "train":
            shares = [make._share(row["messages"][1]["content"], words["train"]) for row in rows]
            assert max(shares) <= make.SHARED
    texts = [record.messages[2]["content"].casefold() for records in shipped.values() for record in records]
    assert len(set(texts)) == len(texts)
    assert re.search("license", (directory / "README.md").read_text())


def test_validation_does_not_use_the_test_split(shipped):
    train, validation = sources.splits("debian_synopses")
    assert train.digest == shipped["train"].digest and validation.digest == shipped["validation"].digest


def test_examples_in_docstrings():
    assert doctest.testmod(make).failed == 0
