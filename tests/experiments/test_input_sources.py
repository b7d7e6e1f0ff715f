"""Records by number from every kind of source, and errors that say where something is wrong."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from experiments.errors import UserError
from experiments.input import columnar, json_rows, sources
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
    monkeypatch.setattr(json_rows, "_CHUNK", 7)  # lines straddle what is indexed at a time
    path = write_lines(tmp_path / "x.jsonl", [{"messages": TALK, "id": 1}, *ROWS], end)
    records = sources.read(str(path), "train")
    assert len(records) == 6
    assert records[5] == Completion("p4", "c4") and records[0] == Conversation(tuple(TALK))
    assert records.location(5) == f"{path}, line 6"
    few = sources.first(records, 2)
    assert len(few) == 2 and few[1] == records[1] and few.digest != records.digest
    with pytest.raises(UserError, match=r"x.jsonl: expected at least 7 records, got 6"):
        sources.first(records, 7)


def test_columns_between_tabs(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes("id\tcompletion\tprompt\r\n1\tc é\tp 1\r\n2\tc 2\t\r\n".encode())
    records = sources.read(str(path), "train")
    assert [records[i] for i in range(len(records))] == [Completion("p 1", "c é"), Completion("", "c 2")]
    path.write_text("prompt\tcompletion\nx\n")
    with pytest.raises(UserError, match=r"x.tsv, line 2: 1 columns, expected 2 as in the header"):
        sources.read(str(path), "train")[0]
    path.write_text("question\tanswer\nx\ty\n")
    with pytest.raises(UserError, match=r"x.tsv, line 2: got question, answer, expected .*the nearest is reward"):
        sources.read(str(path), "train")[0]


def test_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "_ROWS", 1)
    records = sources.read(str(write_parquet(tmp_path / "x.parquet", ROWS)), "train")
    assert [records[i].prompt for i in (4, 0, 1, 3, 2)] == ["p4", "p0", "p1", "p3", "p2"]
    assert len(records) == 5 and records.location(4).endswith("x.parquet, row 5")
    talks = [{"messages": TALK}, {"messages": [{**TALK[0], "name": "me"}, TALK[1]]}]
    records = sources.read(str(write_parquet(tmp_path / "y.parquet", talks)), "train")
    assert records[0] == Conversation(tuple(TALK))  # the column that another row has is not there
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"x.parquet: cannot be read as Parquet"):
        sources.read(str(tmp_path / "x.parquet"), "train")


def test_data_sets_of_the_hub(monkeypatch):
    def table(rows):
        return datasets.Dataset.from_list(rows)

    tables = {"train_sft": table(ROWS), "test_sft": table(ROWS[:2]), "other": table(ROWS[:1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: tables)
    digest = sources.read("org/name", "train").digest
    tables["train_sft"] = table(ROWS)
    train, validation = sources.splits("org/name:2")
    assert len(train) == 10 and len(validation) == 2 and train[8] == Completion("p3", "c3")
    assert train.location(3) == "org/name:train_sft, row 4"
    assert sources.read("org/name", "train").digest == digest != sources.read("org/name:other", "train").digest
    train, validation = sources.splits("org/name:config:other")
    assert len(train) == 1 and validation is None
    with pytest.raises(UserError, match=r"org/name: no split validation; expected one of other, test_sft, train_sft"):
        sources.splits("org/name", "org/name:validation")
    tables["train_gen"] = table(ROWS)
    with pytest.raises(UserError, match=r"train_sft and train_gen match train; choose one, as in org/name:train_sft"):
        sources.read("org/name", "train")


def test_without_a_network_the_hub_is_a_users_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"org/name:train_sft: no such file, and the Hugging Face Hub does not"):
        sources.read("org/name:train_sft", "train")


def test_shipped_labels_ask_for_texts():
    train, validation = sources.splits("debian_sections")
    assert (len(train), len(validation)) == (7707, 1939) and train.digest != validation.digest
    assert train[0] == Completion("mail:", " light SMTP client with support for server profiles - the regular MTA")
    assert train.location(0) == "debian_sections, train example 1"


def test_splits(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", ROWS)
    assert sources.splits(str(train))[1] is None
    assert sources.splits(str(tmp_path))[1] is None
    other = write_parquet(tmp_path / "validation.parquet", ROWS[:2])
    for splits in (sources.splits(str(tmp_path)), sources.splits(str(train), str(other))):
        assert [len(records) for records in splits] == [5, 2]
    write_parquet(tmp_path / "train.parquet", ROWS)
    with pytest.raises(UserError, match=r"got train.jsonl and train.parquet"):
        sources.splits(str(tmp_path))


@pytest.mark.parametrize("data", ["./none.jsonl", "none", "some/none.jsonl", "/a/b"])
def test_what_is_not_there(data):
    with pytest.raises(
        UserError,
        match=f"{data}: no such file or directory; data sets are debian_synopses, debian_sections, debian_siblings,",
    ):
        sources.read(data, "train")


def test_files_of_no_use(tmp_path):
    for name, why in (("x.txt", "expected a name that ends in .jsonl, .*got .txt"), ("x.jsonl", "no records")):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=why):
            sources.read(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a",', "not JSON"),
        ("[]", "got an empty list, expected"),
        ("{}", "got nothing, expected"),
        (
            '{"question": "a", "answer": "b"}',
            r"got question, answer, expected .* the nearest is reward: prompt, answer",
        ),
        ('{"instruction": "a", "response": "b"}', r"the nearest is alpaca: instruction, output, optionally input"),
        ('{"prompt": 1, "completion": "b"}', "prompt is a number, expected a string"),
        ('{"prompt": "a", "completion": " "}', "completion is empty"),
        ('{"messages": []}', "messages is an empty list"),
        ('{"messages": {}}', "messages is an object"),
        ('{"messages": ["hi"]}', "message 1: got a string"),
        ('{"messages": [{"role": "user"}]}', "message 1: content is missing"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 1: content is null"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}', "tools, item 1: got a number"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "none of the 1 messages has the role assistant"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, why):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    records = sources.read(str(path), "train")
    with pytest.raises(UserError, match=f"x.jsonl, line 2(,|:).*{why}"):
        records[1]


def test_weights_and_shares(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", ROWS)
    b = write_parquet(tmp_path / "b:2.parquet", ROWS[:4])
    records, _ = sources.splits([f"{a}:2", f"{b}:0.5"])
    prompts = [record.prompt for record in records]
    assert prompts[:10] == 2 * [f"p{i}" for i in range(5)] and len(prompts) == 12
    assert len(set(prompts[10:])) == 2 and records.location(11).startswith(f"{b}, row")
    assert records.digest != sources.splits([f"{a}:2", f"{b}:0.75"])[0].digest
    rest, share = sources.split(records, 0.3, seed=0)
    assert len(share) == 2
    assert {share.location(i) for i in range(2)}.isdisjoint({rest.location(i) for i in range(len(rest))})
    assert [len(part) for part in sources.splits([str(a), str(b)], [str(a)])] == [9, 5]
    with pytest.raises(UserError, match=r"a.jsonl:0: a weight of 0 uses nothing"):
        sources.splits(f"{a}:0")
    for weight in ("nan", "inf", "-1", "1,5", "2x"):
        for name in (a, tmp_path / "*.jsonl"):
            with pytest.raises(UserError, match=rf"jsonl:{weight}: invalid weight {weight}; expected a positive"):
                sources.splits(f"{name}:{weight}")
    assert len(sources.splits(f"{a}:2e0")[0]) == 10
    with pytest.raises(UserError, match=r"a.jsonl:1e9: a weight of 1e\+09 yields more than 100,000,000 examples from"):
        sources.splits(f"{a}:1e9")
    named = write_lines(tmp_path / "c.jsonl:3", ROWS)
    with pytest.raises(UserError, match=r"c.jsonl:3: expected a name that ends in"):  # the file, not c.jsonl thrice
        sources.splits(str(named))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"x.jsonl, line 1: not UTF-8"):
        sources.read(str(tmp_path / "x.jsonl"), "train")[0]
