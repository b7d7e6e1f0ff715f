"""Records by number from every kind of source, and errors that say where something is wrong."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from experiments.errors import UserError
from experiments.input import sources
from experiments.input.records import Completion, Conversation

TALK = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "tab\tand\nline"}]
ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "source": None} for i in range(5)]


def write_lines(path, rows, end="\n"):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end, encoding="utf-8")
    return path


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_are_read_by_number(tmp_path, end, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 7)  # lines straddle what is indexed at a time
    path = write_lines(tmp_path / "x.jsonl", [{"messages": TALK, "id": 1}, *ROWS], end)
    records = sources.read(str(path), "train")
    assert len(records) == 6
    assert records[5] == Completion("p4", "c4") and records[0] == Conversation(tuple(TALK))
    assert records.place(5) == f"{path}, line 6"
    few = sources.first(records, 2)
    assert len(few) == 2 and few[1] == records[1] and few.digest != records.digest
    with pytest.raises(UserError, match=r"x.jsonl: 7 records asked for, there are 6"):
        sources.first(records, 7)


def test_columns_between_tabs(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes("id\tcompletion\tprompt\r\n1\tc é\tp 1\r\n2\tc 2\t\r\n".encode())
    records = sources.read(str(path), "train")
    assert [records[i] for i in range(len(records))] == [Completion("p 1", "c é"), Completion("", "c 2")]
    path.write_text("prompt\tcompletion\nx\n")
    with pytest.raises(UserError, match=r"x.tsv, line 2: 1 columns between tabs, expected 2"):
        sources.read(str(path), "train")[0]
    path.write_text("prompt\tanswer\nx\ty\n")
    with pytest.raises(UserError, match=r"line 1: expected a header with prompt and completion .*found prompt, answer"):
        sources.read(str(path), "train")


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_ROWS", 1)
    records = sources.read(str(write_parquet(tmp_path / "x.parquet", ROWS)), "train")
    assert [records[i].prompt for i in (4, 0, 1, 3, 2)] == ["p4", "p0", "p1", "p3", "p2"]
    assert len(records) == 5 and records.place(4).endswith("x.parquet, row 5")
    talks = [{"messages": TALK}, {"messages": [{**TALK[0], "name": "me"}, TALK[1]]}]
    records = sources.read(str(write_parquet(tmp_path / "y.parquet", talks)), "train")
    assert records[0] == Conversation(tuple(TALK))  # the column that another row has is not there
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x.parquet: cannot be read as Parquet"):
        sources.read(str(tmp_path / "x.parquet"), "train")


def test_rows_of_the_datasets_library():
    def table(rows):
        return datasets.Dataset.from_list(rows)

    digest = sources.table_digest(table(ROWS))
    assert digest == sources.table_digest(table(ROWS)) != sources.table_digest(table(ROWS[:4]))
    records = sources.Table(table(ROWS), "org/name:train", digest)
    assert len(records) == 5 and records[3] == Completion("p3", "c3")
    assert records.place(3) == "org/name:train, row 4"


def test_without_a_network_the_hub_is_a_users_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/name:train_sft: no such file, and not to be had from the hub"):
        sources.read("org/name:train_sft", "train")


def test_shipped_labels_ask_for_texts():
    train, validation = sources.splits("debian_sections")
    assert (len(train), len(validation)) == (7707, 1939) and train.digest != validation.digest
    assert train[0] == Completion("mail:", " light SMTP client with support for server profiles - the regular MTA")
    assert train.place(0) == "debian_sections, train example 1"


def test_splits(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", ROWS)
    assert sources.splits(str(train))[1] is None
    with pytest.raises(UserError, match=r"expected one of validation.jsonl, validation.tsv, .*found none"):
        sources.splits(str(tmp_path))
    other = write_parquet(tmp_path / "validation.parquet", ROWS[:2])
    for found in (sources.splits(str(tmp_path)), sources.splits(str(train), str(other))):
        assert [len(records) for records in found] == [5, 2]
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(UserError, match=r"found train.jsonl and train.parquet"):
        sources.splits(str(tmp_path))


@pytest.mark.parametrize("data", ["./none.jsonl", "none", "some/none.jsonl", "/a/b"])
def test_what_is_not_there(data):
    with pytest.raises(UserError, match=f"{data}: no such file or directory, and neither debian_sections nor"):
        sources.read(data, "train")


def test_files_of_no_use(tmp_path):
    for name, why in (("x.csv", "expected a name that ends in .jsonl, .tsv, .parquet"), ("x.jsonl", "no records")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=why):
            sources.read(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "an empty line"),
        ('{"prompt": "a",', "not JSON"),
        ("[]", "found an empty list, expected"),
        ("{}", "found nothing, expected"),
        ('{"prompt": "a", "answer": "b"}', r"found prompt, answer, expected \{.messages"),
        ('{"prompt": 1, "completion": "b"}', "prompt is a number, expected a string"),
        ('{"prompt": "a", "completion": " "}', "the completion is empty"),
        ('{"messages": []}', "messages is an empty list"),
        ('{"messages": {}}', "messages is an object"),
        ('{"messages": ["hi"]}', "message 1: found a string"),
        ('{"messages": [{"role": "user"}]}', "message 1: content is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: content is null"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', "the record has tools"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, why):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    records = sources.read(str(path), "train")
    with pytest.raises(UserError, match=f"x.jsonl, line 2(,|:).*{why}"):
        records[1]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"x.jsonl, line 1: not UTF-8"):
        sources.read(str(tmp_path / "x.jsonl"), "train")[0]
