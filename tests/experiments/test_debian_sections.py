"""The script that makes the shipped data."""

from experiments.tasks.debian_sections import make

STANZAS = """\
Package: chess
Version: 1
Section: games
Description: a game of
 chess continues here

Package: chess-data
Source: chess
Section: games
Description: boards and pieces

Package: libmail
Section: mail
Description: a library

Package: libreoffice-base
Source: libreoffice (1:7.4)
Section: database
Description:  office   database

Package: another-chess
Section: games
Description: A game of

Package: two-homes
Section: net
Description: shared words

Package: two-homes-x
Section: web
Description: shared words

Package: python3-thing
Section: python
Description: not topical
"""


def test_keeps_topical_packages_with_distinct_synopses():
    examples = make.examples(STANZAS.splitlines(keepends=True))
    assert sorted(examples) == [
        make.Example("database", "libreoffice", "libreoffice-base", "office database"),
        make.Example("games", "another-chess", "another-chess", "A game of"),
    ]


def test_order_of_the_input_does_not_matter():
    stanzas = STANZAS.strip().split("\n\n")
    other = "\n\n".join(reversed(stanzas)).splitlines(keepends=True)
    assert make.examples(other) == make.examples(STANZAS.splitlines(keepends=True))


def test_split_depends_on_the_source_alone_and_has_its_shares():
    counts = dict.fromkeys(make.SPLITS, 0)
    for number in range(4000):
        counts[make.split(f"source-{number}")] += 1
    assert abs(counts["train"] / 4000 - 0.65) < 0.03 and abs(counts["test"] / 4000 - 0.20) < 0.03


def test_writes_the_same_bytes_again(tmp_path, capsys):
    examples = make.examples(STANZAS.splitlines(keepends=True))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make.write(tmp_path / name, examples)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert "train:" in capsys.readouterr().out
