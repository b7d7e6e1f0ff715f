"""Files of every kind row by row: the same records, whatever holds them, and no traceback, whatever they hold."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from experiments.errors import UserError
from experiments.input import json_rows, sources
from experiments.input.records import Completion, Conversation

ROWS = [
    {"prompt": 'quote " and, comma\tand tab', "completion": "two\nlines"},
    {"prompt": "", "completion": " Grüße 🙂\r\n"},
    {"prompt": "\u2028p\x0b", "completion": "x" * 200_000},
]
RECORDS = [Completion(**row) for row in ROWS]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def records_of(path, split="train"):
    return list(sources.read(str(path), split))


def lines(rows, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows) + end


def delimited(rows, delimiter, end="\r\n"):
    with io.StringIO(newline="") as buffer:
        writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end)
        writer.writerow(["id", "prompt", "completion"])
        writer.writerows([i, row["prompt"], row["completion"]] for i, row in enumerate(rows))
        return buffer.getvalue()


def parquet(rows, path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def zstd(data):
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


FILES = {
    "a.jsonl": lines(ROWS),
    "a.ndjson": lines(ROWS, "\r\n"),
    "blank.jsonl": "\n  \r\n" + lines(ROWS, "\n\n\t\n"),
    "mark.jsonl": "\ufeff" + lines(ROWS),
    "lines.json": lines(ROWS),
    "array.json": json.dumps(ROWS),
    "pretty.json": "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "nested.json": json.dumps({"version": "1", "data": ROWS}),
    "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}, indent=1),
    "a.csv": delimited(ROWS, ","),
    "mark.csv": "\ufeff" + delimited(ROWS, ",", "\n") + "\n\n",
    "a.tsv": delimited(ROWS, "\t"),
}


@pytest.mark.parametrize("window", [7, 1 << 24])
@pytest.mark.parametrize("name", FILES)
def test_text_files(tmp_path, name, window, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", window)  # characters and strings straddle what is read at a time
    path = tmp_path / name
    path.write_bytes(FILES[name].encode())
    assert records_of(path) == RECORDS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_compressed_files(tmp_path, name, suffix):
    data = FILES[name].encode()
    compress = gzip.compress if suffix == ".gz" else zstd
    halves = compress(data[: len(data) // 2]) + compress(data[len(data) // 2 :])  # two frames, as pigz and pzstd write
    for number, compressed in enumerate((compress(data), halves)):
        path = tmp_path / f"{number}-{name}{suffix}"
        path.write_bytes(compressed)
        assert records_of(path) == RECORDS
        path.write_bytes(compressed[:-9])
        with pytest.raises(UserError, match=f"{path.name}: cannot be read .*(Truncated|Error)"):
            records_of(path)
    path.write_bytes(data)
    with pytest.raises(UserError, match="expected a file compressed with gzip or zstd"):
        records_of(path)


def test_nested_parquet(tmp_path):
    call = {"function": {"name": "f", "arguments": {"of": "tower"}}}
    other = {"function": {"name": "g", "arguments": {"at": "noon"}}}
    rows = [
        {
            "messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": json.dumps([{"name": "f"}]),
        },
        {"messages": [*TALK, TALK[0], {"role": "assistant", "content": "", "tool_calls": [other]}], "tools": None},
    ]
    parquet(rows, tmp_path / "a.parquet")
    first, second = records_of(tmp_path / "a.parquet")
    # A struct has the keys of all rows, as null: they are not part of the message.
    assert first == Conversation(
        (TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"type": "function", **call}]}),
        tools=({"type": "function", "function": {"name": "f"}},),
    )
    assert second.messages[1] == TALK[1] and second.tools is None
    assert second.messages[3]["tool_calls"] == [{"type": "function", **other}]


def test_data_sets_saved_to_disk(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    assert records_of(tmp_path / "one") == RECORDS
    assert sources.splits(str(tmp_path / "one"))[1] is None
    datasets.DatasetDict({"train": table, "test": datasets.Dataset.from_list(ROWS[:1], split="test")}).save_to_disk(
        tmp_path / "two"
    )
    train, validation = sources.splits(str(tmp_path / "two"))
    assert list(train) == RECORDS and list(validation) == RECORDS[:1]
    assert train.location(2).endswith("two/train/data-00000-of-00001.arrow, row 3")
    with pytest.raises(UserError, match=r"two: no split validation; expected one of test, train"):
        sources.splits(str(tmp_path / "two"), f"{tmp_path / 'two'}:validation")
    assert list(sources.splits(f"{tmp_path / 'one'}:train")[0]) == RECORDS
    with pytest.raises(UserError, match=r"one: no split test; expected one of train"):
        sources.splits(str(tmp_path / "one"), f"{tmp_path / 'one'}:test")
    with pytest.raises(UserError, match=r"test: no split train; expected one of test"):
        sources.splits(f"{tmp_path / 'two' / 'test'}:train")
    (tmp_path / "one" / "data-00001-of-00002.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow: cannot be read as Arrow"):
        records_of(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../two/secret"}]}')
    with pytest.raises(UserError, match=r"state.json: expected the names of Arrow files in the same directory"):
        records_of(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "\\ud83d", "completion": "b"}', r"line 3: invalid Unicode, a lone surr"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}', 'line 3: the key "prompt" appears twice'),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "score": NaN}', "line 3: the number NaN"),
        ("a.jsonl", '{"prompt": "a", "completion": "b", "score": 1e999}', "line 3: the number 1e999"),
        ("a.jsonl", '{"id": ' + "9" * 5000 + "}", "line 3: a number has too many digits"),
        ("a.jsonl", '{"id": ' + "[" * 500 + "]" * 500 + "}", "line 3: arrays or objects are nested more than 200"),
        ("a.jsonl", '{"id": ' + "[" * 100_000, "line 3: arrays or objects are nested more than 200"),
        ("a.jsonl", '{"prompt": "a" "b"}', r"line 3: not JSON \(Expecting ',' delimiter at column 16"),
        ("a.csv", 'a,b,"c"d"', "line 3: not a valid CSV row"),
        ("a.csv", 'a,"never closed', "line 3: not a valid CSV row"),
        ("a.csv", "a,b", "line 3: 2 columns, expected 3 as in the header"),
        ("a.json", '{"prompt": }', "line 3: not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, message):
    before = {"a.jsonl": lines(ROWS[1:]) + "\n", "a.csv": "id,prompt,completion\n1,a,b\n", "a.json": "[\n{},\n"}[name]
    if name == "a.jsonl":
        before = lines([{"prompt": "a", "completion": "b"}] * 2)
    (tmp_path / name).write_text(before + text + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{name}, {message}"):
        records_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", lines(ROWS).encode("utf-16"), "UTF-16 or UTF-32 text, expected UTF-8"),
        ("a.csv", delimited(ROWS, ",").encode("utf-16-le"), "UTF-16 or UTF-32 text, expected UTF-8"),
        ("a.csv", b"prompt,completion\na,\xff\n", "line 2: not UTF-8"),
        ("a.csv", b"prompt,prompt\na,b\n", "line 1: the header has the column 'prompt' twice"),
        ("a.csv", b"prompt,completion\n", "the file has no records"),
        ("a.json", b"[]", "the file has no records"),
        ("a.json", b'{"a": 1}', "an object with a, expected an array of records or an object with one"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "an object with a, b, expected"),
        ("a.json", b'[{"prompt": "a"}] {}', "line 1: not JSON .more text after"),
        ("a.json", b'[{"prompt": "a"}\n{}]', "line 2: not JSON .expected , or ]"),
        ("a.json", b"[{}, \xff]", "not UTF-8"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.arrow", b"", "the file has no records"),
        ("a.jsonl", b"\n \n", "the file has no records"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}(,|:).*{message}"):
        records_of(tmp_path / name)


def test_a_single_record_as_an_object(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": TALK}, indent=2))
    assert records_of(tmp_path / "a.json") == [Conversation(tuple(TALK))]


def test_damaged_files_end_in_a_sentence(tmp_path):
    rng = random.Random(0)
    table = pyarrow.Table.from_pylist([{"messages": TALK, "prompt": "p" * 50}] * 20)
    with pyarrow.OSFile(str(tmp_path / "whole"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    whole = {
        "a.parquet": parquet(table.to_pylist(), tmp_path / "whole.parquet"),
        "a.arrow": (tmp_path / "whole").read_bytes(),
        "a.jsonl": lines(ROWS[:2]).encode(),
        "a.json": FILES["nested.json"].encode()[:400] + b'"}]}',
        "a.csv": FILES["a.csv"].encode()[:300],
        "a.jsonl.gz": gzip.compress(lines(ROWS[:2]).encode()),
        "a.jsonl.zst": zstd(lines(ROWS[:2]).encode()),
    }
    read = 0
    for turn in range(280):
        name = list(whole)[turn % len(whole)]
        data = bytearray(whole[name])
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(len(data))] = rng.choice([0, 255, 34, rng.randrange(256)])
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.1:
            data = rng.randbytes(200)
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(UserError):
            records = sources.read(str(tmp_path / name), "train")
            read += 1
            for index in range(len(records)):
                with contextlib.suppress(UserError):
                    records[index]
    assert 0 < read < 280


def test_each_byte_of_a_parquet_footer(tmp_path):
    """Two places of it say the number of rows: where both are wrong alike, the pages themselves contradict."""
    whole = parquet([{"text": "t" * 5}] * 3, tmp_path / "whole.parquet")
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    rows = [index for index in range(start, len(whole)) if whole[index] == 6]  # 3, as a variable-length integer
    damaged = [(index,) for index in range(start, len(whole) - 4)] + list(itertools.combinations(rows, 2))
    contradicted = 0
    for indices in damaged:
        data = bytearray(whole)
        for index in indices:
            data[index] += 4 if data[index] < 252 else -4
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            records = list(sources.read(str(tmp_path / "a.parquet"), "train"))
        except UserError as error:
            contradicted += "has 3 rows, unlike its metadata" in str(error)
        else:
            assert len(records) <= 3
    assert contradicted


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl: expected a file or a directory, got a pipe"):
        records_of(tmp_path / "a.jsonl")
