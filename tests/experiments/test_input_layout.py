"""Which files a directory, a glob or a name stands for."""

import pytest

from experiments.errors import UserError
from experiments.input import layout, sources

ROW = '{"prompt": "a", "completion": "b"}\n'


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW)
    return root


@pytest.mark.parametrize(
    ("names", "train", "validation"),
    [
        (["train.jsonl", "valid.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl"], ["train.jsonl"], ["dev.jsonl"]),
        (["train.jsonl.gz", "eval.json"], ["train.jsonl.gz"], ["eval.json"]),
        (["train.jsonl", "README.md", "notes.txt", "dataset_infos.json", ".hidden.jsonl"], ["train.jsonl"], []),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            ["test-00000-of-00001.parquet"],
        ),
        (["train/a.jsonl", "train/b.jsonl", "val/a.jsonl"], ["a.jsonl", "b.jsonl"], ["a.jsonl"]),
        (["alpaca_train.json", "alpaca_val.json"], ["alpaca_train.json"], ["alpaca_val.json"]),
        (["part-0.jsonl", "part-1.jsonl", "more.csv"], ["more.csv", "part-0.jsonl", "part-1.jsonl"], []),
    ],
)
def test_splits_of_a_directory(tmp_path, names, train, validation):
    tree(tmp_path, *names)
    assert [path.name for path in layout.in_directory(tmp_path, "train")] == train
    assert [path.name for path in layout.in_directory(tmp_path, "validation", separate=True)] == validation


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "no data files; expected files that end in"),
        (["valid.jsonl"], "no split train; expected one of valid"),
        (["train.jsonl", "train.csv"], "got train.csv and train.jsonl"),
        (
            ["train_sft.jsonl", "train_gen.jsonl"],
            "train_gen and train_sft match train; choose one, as in .*:train_gen",
        ),
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "got 2 shards, expected 3 as in train-00000"),
    ],
)
def test_directories_that_say_too_little(tmp_path, names, message):
    tree(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        layout.in_directory(tmp_path, "train")


def test_a_directory_without_test_files_has_no_test_records(tmp_path):
    tree(tmp_path, "train.jsonl", "valid.jsonl")
    assert sources.read_separate([str(tmp_path)], "test") is None
    with pytest.raises(UserError, match="no split test; expected one of train, valid"):
        sources.read(str(tmp_path), "test")


def test_a_named_split_of_a_directory(tmp_path):
    tree(tmp_path, "data/train_sft-00000-of-00001.jsonl", "data/train_gen.jsonl", "data/test_sft.jsonl")
    train, validation = sources.splits(f"{tmp_path}:train_gen:2")
    assert len(train) == 2 and validation is None and train.location(0).endswith("train_gen.jsonl, line 1")
    with pytest.raises(UserError, match="no split nothing; expected one of test_sft, train_gen, train_sft"):
        sources.splits(f"{tmp_path}:nothing")


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["train.jsonl", "test.jsonl"], "validation", "no split validation; expected one of test, train"),
        (["a.jsonl", "b.jsonl"], "test", "no split test; expected one of a, b"),
        (["a.jsonl", "b.jsonl"], "validation", "no split validation; expected one of a, b"),
        (["train/a.jsonl", "test/a.jsonl"], "dev", "no split dev; expected one of test, train"),
    ],
)
def test_a_named_split_has_to_exist(tmp_path, names, split, message):
    tree(tmp_path, *names)
    with pytest.raises(UserError, match=f"{tmp_path}: {message}"):
        sources.splits(f"{tmp_path}:{split}")
    with pytest.raises(UserError, match=f"{tmp_path}: {message}"):
        sources.splits("debian_sections", [f"{tmp_path}:{split}"])


def test_a_named_split_by_another_word(tmp_path):
    tree(tmp_path, "train_sft.jsonl", "dev.jsonl", "one/a.jsonl")
    train, validation = sources.splits(f"{tmp_path}:train", f"{tmp_path}:validation")
    assert train.location(0).endswith("train_sft.jsonl, line 1") and validation.location(0).endswith(
        "dev.jsonl, line 1"
    )
    assert len(sources.splits(f"{tmp_path}/one:train")[0]) == 1  # files without splits are to train on


def test_named_splits_of_labeled_texts(tmp_path):
    train, validation = sources.splits("debian_sections:validation", "debian_sections:test")
    assert train.location(0).startswith("debian_sections, validation") and validation[0].prompt.endswith(":")
    tree(tmp_path, "labels.txt")
    (tmp_path / "labels.txt").write_text("games\nmail\n")
    (tmp_path / "train.tsv").write_text("label\ttext\nmail\thello\n")
    assert sources.splits(f"{tmp_path}:train")[0][0] == sources.splits(f"{tmp_path}")[0][0]
    with pytest.raises(UserError, match=r"no test.tsv or test.tsv.gz"):
        sources.splits(f"{tmp_path}:test")


def test_sources_that_are_trained_on_too(tmp_path):
    tree(tmp_path, "a.jsonl", "b/copy.jsonl")
    (tmp_path / "c.jsonl").write_text(ROW + ROW)
    rows = f"[{ROW}]"
    (tmp_path / "both.json").write_text(f'{{"train": {rows}, "validation": {rows}}}')

    def lines(data, validation):
        train, others = sources.splits(f"{tmp_path}/{data}", f"{tmp_path}/{validation}")
        return [line.replace(f"{tmp_path}/", "") for line in sources.overlap_warnings(train, others)]

    why = "also training data; its loss does not measure generalization"
    assert lines("a.jsonl:2", "a.jsonl") == [f"a.jsonl is {why}"]
    assert lines("a.jsonl", "b") == [f"b/copy.jsonl has the same content as a.jsonl, which is {why}"]
    assert lines("a.jsonl", "a.jsonl") == lines("**/*.jsonl", "a.jsonl") == [f"a.jsonl is {why}"]
    assert lines("*.jsonl", "c.jsonl") == [f"c.jsonl is {why}"]
    assert lines("a.jsonl", "c.jsonl") == lines("both.json", "both.json") == []


def test_a_directory_of_one_split_validates_if_asked_to(tmp_path):
    tree(tmp_path, "a.jsonl", "others/part-0.jsonl", "others/part-1.jsonl")
    train, validation = sources.splits(f"{tmp_path}/a.jsonl", f"{tmp_path}/others")
    assert (len(train), len(validation)) == (1, 2)
    tree(tmp_path, "labeled/labels.txt")
    (tmp_path / "labeled" / "labels.txt").write_text("games\nmail\n")
    (tmp_path / "labeled" / "train.tsv").write_text("label\ttext\nmail\thello\n")
    assert sources.splits(f"{tmp_path}/labeled")[1] is None


def test_globs(tmp_path):
    tree(tmp_path, "b.jsonl", "a.jsonl", "deep/c.jsonl", "a.txt")
    assert len(sources.splits(f"{tmp_path}/*.jsonl:3")[0]) == 6
    records = sources.read(f"{tmp_path}/**/*.jsonl", "train")
    assert [source.name.removeprefix(str(tmp_path)) for source in records.sources] == [
        "/a.jsonl",
        "/b.jsonl",
        "/deep/c.jsonl",
    ]
    with pytest.raises(UserError, match=r"\*.csv: matches no file that ends in"):
        sources.read(f"{tmp_path}/*.csv", "train")
    (tmp_path / "[x].jsonl").write_text(ROW)
    assert len(sources.read(f"{tmp_path}/[x].jsonl", "train")) == 1


def test_colons_in_paths(tmp_path):
    tree(tmp_path, "C:/data:1/a.jsonl", "10:30.jsonl")
    assert len(sources.splits(f"{tmp_path}/C:/data:1/a.jsonl")[0]) == 1
    assert len(sources.splits(f"{tmp_path}/C:/data:1/a.jsonl:4")[0]) == 4
    assert len(sources.splits(f"{tmp_path}/10:30.jsonl")[0]) == 1
    assert len(sources.splits(f"{tmp_path}/C:/data:1")[0]) == 1  # a directory of that name
