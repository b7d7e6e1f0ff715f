"""The shipped tags and synopses, and the script that makes them."""

import doctest

from experiments.input import sources
from experiments.tasks import examples
from experiments.tasks.debian_tags import make

TAGS = "Tag: game::board, interface::graphical,\n interface::x11, role::program, use::gameplaying"


def stanza(name, synopsis, tags=TAGS, source=None):
    return f"Package: {name}\nSource: {source or name} (1.0)\n{tags}\nDescription: {synopsis}\n\n"


PACKAGES = (
    stanza("chess", "game of chess, 1")
    + stanza("chess2", "Game of chess (2)")
    + stanza("chess-few", "another game of chess", "Tag: role::program, use::gameplaying")
    + stanza("chess-old", "transitional package for chess")
    + stanza("chess-dbg", "chess with its symbols")
    + stanza("short", "chess")
    + "".join(stanza(f"part-{letter}", f"part {letter} of many games", source="parts") for letter in "abcdef")
)


def test_what_the_script_leaves_out():
    packages = make.examples(PACKAGES.splitlines(keepends=True))
    names = {example.package for example in packages}
    assert len(names & {"chess", "chess2"}) == 1 and not names & {"chess-few", "chess-old", "chess-dbg", "short"}
    assert sum(name.startswith("part-") for name in names) == 4
    assert packages[0].tags == (
        f"name: {packages[0].package}; game: board; interface: graphical, x11; role: program; use: gameplaying"
    )


def test_the_order_of_the_list_does_not_matter():
    other = "\n\n".join(reversed(PACKAGES.strip().split("\n\n"))).splitlines(keepends=True)
    assert make.examples(other) == make.examples(PACKAGES.splitlines(keepends=True))


def test_the_shipped_files():
    texts = []
    for split in make.SIZES:
        records = sources.read(f"debian_tags:{split}", split)
        assert len(records) == make.SIZES[split]
        rows = [records.sources[0]._rows[i] for i in range(len(records))]
        assert {make.split(row["source"]) for row in rows} == {split}
        assert all(row["messages"][1]["content"].startswith(f"name: {row['package']}; ") for row in rows)
        texts += [row["messages"][2]["content"].casefold() for row in rows]
    assert len(set(texts)) == len(texts)
    assert "license" in (examples.SHIPPED["debian_tags"] / "README.md").read_text()


def test_examples_in_docstrings():
    assert doctest.testmod(make).failed == 0
