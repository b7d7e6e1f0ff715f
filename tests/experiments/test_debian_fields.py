"""The shipped data of several tasks, the script that makes it, and how its tables are read."""

import doctest
import itertools

import pytest

from experiments.errors import UserError
from experiments.tasks import fields
from experiments.tasks.debian_fields import make

STANZAS = """\
Package: chess
Version: 1
Architecture: amd64
Section: games
Tag: interface::graphical, interface::x11, role::program,
 use::gameplaying, works-with::TODO
Description: a game of chess

Package: chess-copy
Architecture: all
Section: games
Tag: interface::graphical, role::program
Description: A game of  chess

Package: chess-dbg
Architecture: amd64
Section: debug
Description: debug symbols of chess

Package: ruby-chess
Architecture: all
Section: ruby
Tag: role::devel-lib, role::shared-lib
Description: chess for Ruby
"""


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setattr(make, "RAREST", 1)
    return make.packages(STANZAS.splitlines(keepends=True))


def test_labels_are_those_of_all_packages_of_a_synopsis(packages):
    labels = {package.package: package.labels for package in packages}
    assert labels == {
        "chess": {"section": "games", "role": "program", "interface": "graphical"},
        "ruby-chess": {"language": "ruby", "architecture": "independent"},
    }


def test_rare_labels_are_left_out(monkeypatch):
    monkeypatch.setattr(make, "RAREST", 2)
    assert not any(package.labels for package in make.packages(STANZAS.splitlines(keepends=True)))


def test_a_task_has_its_first_examples(packages):
    splits = make.divide(packages * 5, dict.fromkeys(make.SPLITS, 2))
    for task in ("section", "language"):
        assert sum(task in package.labels for group in splits.values() for package in group) == 2


def test_the_same_lists_give_the_same_bytes(packages, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make.write(tmp_path / name, make.divide(packages, make.SIZES))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert "packages" in capsys.readouterr().out


def test_the_shipped_data():
    data = fields.load("debian_fields", make.SIZES)
    assert list(data) == list(make.TASKS)
    for splits in data.values():
        assert {name: len(split) for name, split in splits.items()} == make.SIZES
        names = splits["train"].names
        assert 2 <= len(names) <= 22 and all(split.names == names for split in splits.values())
        texts = [{text.casefold() for text in split.texts} for split in splits.values()]
        assert not any(one & other for one, other in itertools.combinations(texts, 2))
    assert sum(path.stat().st_size for path in fields.SHIPPED["debian_fields"].glob("*.gz")) < 400_000


def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path):
    def message(limit=1, **tables):
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.tsv").write_text(tables.get(split, "kind\ttext\na\tone\nb\ttwo\n"))
        with pytest.raises(UserError) as error:
            fields.load(tmp_path, dict.fromkeys(("train", "validation", "test"), limit))
        return str(error.value)

    assert "expected at least 3 rows with a label of kind, got 2" in message(3)
    assert "no column kind" in message(test="sort\ttext\na\tone\n")
    assert "the label 'c' of kind occurs in no row of" in message(validation="kind\ttext\nc\tone\n")
    assert "line 2: expected 2 tab-separated columns" in message(train="kind\ttext\na\n")
    assert "at least two different labels in the column kind" in message(train="kind\ttext\na\tone\n")
    assert "a column for each task" in message(train="text\none\n")
    with pytest.raises(UserError, match="no such data directory"):
        fields.load(tmp_path / "nowhere", make.SIZES)
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(UserError, match=r"no train\.tsv or train\.tsv\.gz"):
        fields.load(tmp_path, make.SIZES)


def test_examples_in_docstrings():
    assert doctest.testmod(make).failed == 0
