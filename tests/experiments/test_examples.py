"""Reading labeled texts: the shipped data, and every way in which a data directory can be wrong."""

import gzip
import itertools

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.tasks import examples
from experiments.tasks.debian_sections import make

SPLITS = ("train", "validation", "test")


def rows(split):
    lines = gzip.decompress((examples.SHIPPED["debian_sections"] / f"{split}.tsv.gz").read_bytes()).decode()
    return [make.Example(*line.split("\t")) for line in lines.splitlines()[1:]]


def test_shipped_splits_have_all_sections_and_the_default_sizes():
    for split, count in zip(SPLITS, (6000, 1900, 2000)):
        table = examples.load("debian_sections", split, count)
        assert len(table) == count and table.labels.dtype == np.int32
        assert table.names == tuple(sorted(make.SECTIONS)) and len(table.names) == 19
        assert set(table.labels) == set(range(19))


def test_shipped_data_is_free_of_leaks():
    splits = {split: rows(split) for split in SPLITS}
    every = list(itertools.chain(*splits.values()))
    assert len({row.synopsis.casefold() for row in every}) == len(every)
    assert len({row.package for row in every}) == len(every)
    assert not any(make.NOT_TOPICAL.search(row.package) for row in every)
    for split, table in splits.items():
        assert all(make.split(row.source) == split for row in table)


def test_first_examples_are_an_even_sample():
    whole, first = (examples.load("debian_sections", "train", limit) for limit in (None, 3000))
    shares = [np.bincount(table.labels, minlength=19) / len(table) for table in (whole, first)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02


def write(directory, text, name="train.tsv"):
    (directory / "labels.txt").write_text("games\nmail\n")
    data = text.encode()
    (directory / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz"])
def test_reads_plain_and_compressed_tables(tmp_path, name):
    write(tmp_path, "label\tid\ttext\ngames\t1\ta chess\u2028game\r\nmail\t2\tspam filter", name)
    table = examples.load(tmp_path, "train")
    assert table.texts == ("a chess\u2028game", "spam filter")
    assert table.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("label\ttext\n", "empty except for its header"),
        ("text\nchess\n", "line 1: the header must name at least two columns"),
        ("label\ttext\ngames\tchess\nsport\tball\n", "line 3: label 'sport' is not in"),
        ("label\ttext\ngames chess\n", "line 2: expected 2 tab-separated columns"),
        ("label\ttext\ngames\tchess\tboard\n", "line 2: expected 2 tab-separated columns"),
        ("label\ttext\ngames\t \n", "line 2: expected 2 tab-separated columns and a text"),
        ("label\ttext\n\ngames\tchess\n", "line 2"),
    ],
)
def test_malformed_table(tmp_path, text, message):
    write(tmp_path, text)
    with pytest.raises(UserError, match=message) as error:
        examples.load(tmp_path, "train")
    assert str(tmp_path / "train.tsv") in str(error.value) and "\n" not in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="no such data directory"):
        examples.load(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"labels\.txt: no such file"):
        examples.load(tmp_path, "train")
    write(tmp_path, "label\ttext\ngames\tchess\n")
    with pytest.raises(UserError, match=r"no test\.tsv or test\.tsv\.gz"):
        examples.load(tmp_path, "test")


def test_too_few_examples(tmp_path):
    write(tmp_path, "label\ttext\ngames\tchess\n")
    with pytest.raises(UserError, match="expected at least 2 examples, got 1"):
        examples.load(tmp_path, "train", 2)


@pytest.mark.parametrize("labels", ["", "games\n", "games\nmail\ngames\n"])
def test_labels_must_differ(tmp_path, labels):
    write(tmp_path, "label\ttext\ngames\tchess\n")
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(UserError, match="at least two different labels"):
        examples.load(tmp_path, "train")


@pytest.mark.parametrize(
    "data",
    [b"no gzip", gzip.compress(b"label\ttext\ngames\tchess\n")[:-9], gzip.compress(b"\xff")],
    ids=["no gzip", "cut off", "no text"],  # the bytes hold the time of day
)
def test_damaged_file(tmp_path, data):
    write(tmp_path, "", "train.tsv.gz")
    (tmp_path / "train.tsv.gz").write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        examples.load(tmp_path, "train")
