"""All records are read before training; what becomes of them is shown in one table."""

import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from rich.console import Console

from experiments.errors import UserError
from experiments.input import sources
from experiments.input.checking import check_records
from experiments.input.packing import Packed
from experiments.input.records import Completion
from experiments.input.usage import show, usage

GOOD = {"prompt": "a", "completion": "b"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mixed(tmp_path):
    a = write(tmp_path / "a.jsonl", GOOD, "{", {**GOOD, "prompt": 1}, {"text": "t"}, "{}", GOOD, "[]")
    b = write(tmp_path / "b.jsonl", GOOD, GOOD)
    return [f"{a}:2", b]


def test_a_malformed_record_ends_it(mixed):
    records, _ = sources.splits(mixed)
    with pytest.raises(UserError, match=r"a.jsonl, line 2: not JSON"):
        check_records(records)
    few, _ = check_records(records, limit=1)
    assert list(few) == [Completion("a", "b")]


def test_malformed_records_are_left_out_and_counted(mixed):
    records, _ = sources.splits(mixed)
    good, findings = check_records(records, on_bad="skip")
    assert [good.location(i).split("/")[-1] for i in range(len(good))] == [
        *(2 * ["a.jsonl, line 1", "a.jsonl, line 4", "a.jsonl, line 6"]),
        *("b.jsonl, line 1", "b.jsonl, line 2"),
    ]
    assert findings[0].forms == {"prompt-completion": 2, "text": 1} and findings[0].skipped == 4
    assert [reason.split("a.jsonl, ")[1][:20] for reason in findings[0].reasons] == [
        "line 2: not JSON (Ex",
        "line 3: prompt is a ",
        "line 5: got nothing,",
    ]
    assert good.digest != records.digest
    assert len(check_records(records, on_bad="skip", limit=7)[0]) == 7
    with pytest.raises(UserError, match="expected at least 9 records, got 8"):
        check_records(records, on_bad="skip", limit=9)


def test_none_is_left(tmp_path):
    records, _ = sources.splits(write(tmp_path / "a.jsonl", "{", "["))
    with pytest.raises(UserError, match=r"all 2 records are malformed; the first: .*a.jsonl, line 1: not JSON"):
        check_records(records, on_bad="skip")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "a preference record .chosen and rejected., which",
        ),
        ({**GOOD, "label": True}, "--data-form prompt-completion trains on every completion"),
        ({"prompt": "a", "answer": "b"}, "a prompt with an answer for a rule-based reward"),
        ({"anchor": "a", "positive": "b"}, "a pair of texts for embeddings, which sft does not support"),
    ],
)
def test_records_for_other_trainings_are_refused(tmp_path, row, message):
    records, _ = sources.splits(write(tmp_path / "a.jsonl", GOOD, row))
    for on_bad in ("error", "skip"):
        with pytest.raises(UserError, match=rf"a.jsonl, line 2: .*{message}"):
            check_records(records, on_bad=on_bad)


def test_the_table(mixed):
    records, findings = check_records(sources.splits(mixed)[0], on_bad="skip")
    # Of the 8 records, the seventh has no example and the sixth two, one of which is cut.
    data = SimpleNamespace(owners=np.array([0, 1, 2, 3, 4, 5, 5, 7]), skipped={6: "b.jsonl, line 1: no template"})
    packed = SimpleNamespace(
        data=data,
        truncated=np.array([1, 0, 0, 1, 0, 1, 0, 1], bool),
        unused=np.array([0, 1, 0, 0, 1, 0, 0, 0], bool),
        unused_reason=Packed.unused_reason,
    )
    rows = usage(records, findings, packed)
    assert [(row.records, row.used, row.passes, row.truncated, row.malformed, row.unused) for row in rows] == [
        (7, 2, 4, 2, 4, 1),
        (2, 1, 1, 1, 1, 0),
    ]
    for width in (80, 120):
        text = io.StringIO()
        show(Console(file=text, width=width), {"train": rows, "validation": rows[1:]}, 64, 256)
        lines = text.getvalue().splitlines()
        header, train, first, form, second = lines[:5]
        assert header.split() == ["data", "format", "records", "used", "per", "epoch", "truncated", "skipped"]
        assert train.split() == ["train"] and form.split() == ["text"]
        assert first.split() == ["a.jsonl", "prompt-completion", "7", "2", "4", "2", "5"]
        assert second.split() == ["b.jsonl", "prompt-completion", "2", "1", "1", "1", "1"]
        assert all(len(line) <= width for line in lines[:7])
        notes = " ".join(lines[7:])
        assert (
            "a.jsonl, line 2: not JSON" in notes
            and "b.jsonl, line 1: no template" in notes
            and "train: skipped: 1 more malformed records" in notes
        )
        assert "train: skipped: 1 without a target within 64 tokens" in notes
        assert (
            "train: warning: 3 of 9 records (33%) are longer than 64 tokens and lose their end, which is what they "
            "teach; --length 256 keeps everything validation: skipped: " in notes
        )


def test_many_files_in_one_table(tmp_path):
    names = []
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        names.append(write(tmp_path / str(number) / "a.jsonl", GOOD))
    records, findings = check_records(sources.splits(names)[0])
    none = np.zeros(20, bool)
    data = SimpleNamespace(owners=np.arange(20), skipped={})
    rows = usage(
        records, findings, SimpleNamespace(data=data, truncated=none, unused=none, unused_reason=Packed.unused_reason)
    )
    text = io.StringIO()
    show(Console(file=text, width=250), {"train": rows}, 64)
    lines = text.getvalue().splitlines()
    assert len(lines) == 2 + 12 and lines[2].split()[0] == names[0]
    assert lines[-1].split() == ["9", "more", "files", "prompt-completion", "9", "9", "0", "0"]


def test_saved_splits_in_the_table(tmp_path):
    split = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path)
    records, findings = check_records(sources.splits([f"{tmp_path}:train", f"{tmp_path}:test"])[0])
    none, data = np.zeros(2, bool), SimpleNamespace(owners=np.arange(2), skipped={})
    text = io.StringIO()
    rows = usage(
        records, findings, SimpleNamespace(data=data, truncated=none, unused=none, unused_reason=Packed.unused_reason)
    )
    show(Console(file=text, width=120), {"train": rows}, 64)
    lines = text.getvalue().splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "train/data-00000-of-00001.arrow",
        "test/data-00000-of-00001.arrow",
    ]
