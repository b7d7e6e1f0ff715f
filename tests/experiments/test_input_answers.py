"""Preferences, rated answers, problems and pairs of texts: from files to batches, and what is counted and named."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer

from experiments.errors import UserError
from experiments.input import sources
from experiments.input.answer_batches import answer_batches
from experiments.input.answers import AnswerEncoder
from experiments.input.checking import Use, check_records
from experiments.input.encoding import load_encoder
from experiments.input.options import Options
from experiments.input.pipeline import iterate
from experiments.input.records import Preference, Problem, Rated, TextPair
from experiments.input.usage import usage
from experiments.models import location
from tests.experiments.test_input_encoding import CHATML

DPO, KTO, GRPO = Use("dpo", (Preference,)), Use("kto", (Rated,)), Use("grpo", (Problem,))
EMBED = Use("embed", (TextPair,))
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in zip(("user", *["assistant"] * 2), "?+-"))
PAIRS = [
    {"prompt": "Say a", "chosen": "aa", "rejected": "b"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": "What is it? good", "rejected": "What is it? bad"},
]


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture
def encoder(tmp_path):
    def build(template=CHATML, **options):
        tokenizer = Tokenizer.from_file(str(location.find("tiny-llama") / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
        return AnswerEncoder(load_encoder(directory, tokenizer.token_to_id("<|im_end|>"), Options(**options)))

    return build


def read(path, use, on_bad="error"):
    return check_records(sources.splits(str(path))[0], on_bad=on_bad, use=use)


def batches(records, encoder, tmp_path, *, length=64, on_bad="error", seed=None, size=4):
    lines = []
    source = answer_batches(
        records, encoder, tmp_path / "tokens",
        length=length, global_batch=size, seed=seed, on_bad=on_bad, report=lines.append,
    )  # fmt: skip
    return source, lines


def texts(encoder, batch, index):
    """The texts of an example's rows, and of what is learned of each."""
    decode = lambda ids: encoder.encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False)  # noqa: E731
    tokens, segments, labels = (batch[name][index] for name in ("tokens", "segments", "labels"))
    return [(decode(t[s > 0]), decode(y[y >= 0])) for t, s, y in zip(tokens, segments, labels)]


@pytest.mark.parametrize("template", [CHATML, None])
def test_preferences_in_every_form(encoder, tmp_path, template):
    encoder = encoder(template)
    rows = PAIRS if template else [PAIRS[0], PAIRS[3]]
    records, (findings,) = read(write(tmp_path / "a.jsonl", *rows), DPO)
    source, lines = batches(records, encoder, tmp_path)
    batch = source[0]
    assert findings.forms == {"preference": len(rows)} and source.steps_per_epoch == 1
    assert batch["tokens"].shape == batch["labels"].shape == (4, 2, 64)
    (chosen, learned), (rejected, other) = texts(encoder, batch, 0)
    if template:
        prompt = "<|im_start|>user\nSay a<|im_end|>\n<|im_start|>assistant\n"
        assert chosen.startswith(f"{prompt}aa<|im_end|>") and rejected.startswith(f"{prompt}b<|im_end|>")
        assert learned == "aa<|im_end|>" and other == "b<|im_end|>"
        assert texts(encoder, batch, 1) == texts(encoder, batch, 2)
        assert [on for _, on in texts(encoder, batch, 3)] == [" good<|im_end|>", " bad<|im_end|>"]
    else:
        assert (chosen, rejected) == ("<|begin_of_text|>Say aaa<|im_end|>", "<|begin_of_text|>Say ab<|im_end|>")
        assert (learned, other) == ("aa<|im_end|>", "b<|im_end|>")
        assert batch["index"].tolist() == [0, 1, -1, -1] and (batch["labels"][2:] == -1).all()
    assert lines[-1] == f"{len(rows)} records; 1 batches of 4 per epoch"


def test_parquet_is_the_same_as_json_lines(encoder, tmp_path):
    rows = [PAIRS[0], PAIRS[0] | {"chosen": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    encoder = encoder()
    one, other = (
        batches(read(path, DPO)[0], encoder, tmp_path)[0][0]
        for path in (write(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


BROKEN = [
    ({"prompt": "p", "chosen": "a", "rejected": " a"}, "chosen and rejected are the same"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD | {"content": "+ "}]}, "chosen and rejected are the same"),
    ({"prompt": "p", "chosen": "a", "rejected": " "}, "rejected is empty"),
    ({"prompt": [USER], "chosen": [GOOD | {"content": ""}], "rejected": [BAD]}, "chosen is empty"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen has no message of the assistant"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_a_preference_without_a_difference_or_an_answer_ends_it(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"a.jsonl, line 2: .*{message}"):
        read(write(tmp_path / "a.jsonl", PAIRS[0], row), DPO)


def test_they_are_counted_and_named(encoder, tmp_path):
    """Malformed ones, those that the template makes equal, and those that are too long."""
    long = {"prompt": "Say a", "chosen": "a " * 60, "rejected": "b"}
    thoughts = ([GOOD | {"reasoning_content": text}] for text in "ab")
    same = dict(zip(("chosen", "rejected"), thoughts)) | {"prompt": [USER]}  # the template ignores the reasoning
    rows = [PAIRS[0], *(row for row, _ in BROKEN), long, same, PAIRS[1]]
    records, findings = read(write(tmp_path / "a.jsonl", *rows), DPO, on_bad="skip")
    assert findings[0].skipped == 5 and "line 2: chosen and rejected are the same" in findings[0].reasons[0]
    encoder = encoder()
    with pytest.raises(UserError, match="line 8: chosen and rejected have the same tokens"):
        batches(records, encoder, tmp_path)
    source, lines = batches(records, encoder, tmp_path, on_bad="skip")
    longest = int(source.longest.max())
    where = f"{tmp_path / 'a.jsonl'}, line 7 ({longest})"
    assert f"skipped: 1 longer than 64 tokens: {where}; --length {longest} keeps everything" in lines
    (row,) = usage(records, findings, source)
    assert (row.records, row.used, row.malformed, row.unused) == (9, 2, 6, 1)
    assert source[0]["index"].tolist() == [0, 3, -1, -1]
    assert not batches(records, encoder, tmp_path, on_bad="skip", length=longest)[0].unused.any()
    with pytest.raises(UserError, match=rf"none of 3 records fits into 8 tokens.*--length {longest} keeps everything"):
        batches(records, encoder, tmp_path, on_bad="skip", length=8)


def test_rated_answers_have_the_answers_of_others_too(encoder, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}", "label": i != 1} for i in range(3)]
    encoder = encoder()
    records, _ = read(write(tmp_path / "a.jsonl", *rows), KTO)
    source, _ = batches(records, encoder, tmp_path, size=2)
    batch = source[0]
    assert batch["desirable"].tolist() == [True, False]
    (text, learned), (mixed, other) = texts(encoder, batch, 0)
    assert learned == "answer 0<|im_end|>" and other == "answer 1<|im_end|>"
    assert mixed == text.replace("answer 0", "answer 1")
    alone = source[1]  # the last batch has one record
    assert alone["desirable"].tolist() == [True, False] and alone["index"].tolist() == [2, -1]
    assert [on for _, on in texts(encoder, alone, 0)] == ["answer 2<|im_end|>", "answer 0<|im_end|>"]
    with pytest.raises(UserError, match="line 1: completion is empty"):
        read(write(tmp_path / "b.jsonl", {"prompt": "p", "completion": "", "label": True}), KTO)


def test_problems_are_prompts(encoder, tmp_path):
    encoder = encoder()
    records, _ = read(
        write(tmp_path / "a.jsonl", {"prompt": "1+1?", "answer": 2}, {"prompt": [USER], "answer": "x"}), GRPO
    )
    source, _ = batches(records, encoder, tmp_path, size=2)
    batch = source[0]
    assert batch["tokens"].shape == (2, 64) and (batch["labels"] == -1).all()
    text = encoder.encoder.tokenizer.decode(batch["tokens"][0][batch["segments"][0] > 0].tolist(), False)
    assert text == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert [records[i].answer for i in batch["index"]] == ["2", "x"]


@pytest.mark.parametrize(
    ("row", "use", "message"),
    [
        ({"prompt": "p", "answer": ""}, GRPO, "answer is empty"),
        ({"prompt": " ", "answer": "a"}, GRPO, "prompt is empty"),
        ({"prompt": [USER, GOOD], "answer": "a"}, GRPO, "ends with a message of the assistant"),
        (
            {"prompt": "p", "answer": "a"},
            DPO,
            "a prompt with a checkable answer .* which dpo does not support; expected a pref",
        ),
        (
            {"prompt": "p", "completion": "c"},
            KTO,
            "a prompt with a completion, which kto does not support; expected an ans",
        ),
        ({"anchor": "a", "positive": ""}, EMBED, "positive is empty"),
        ({"anchor": "a", "positive": "b", "negative": ["c", "b"]}, EMBED, "a negative is the same text as positive"),
        ({"query": "a", "document": 1}, EMBED, "document is a number|document is .*expected a string"),
    ],
)
def test_other_records_are_refused(tmp_path, row, use, message):
    with pytest.raises(UserError, match=rf"a.jsonl, line 1: .*{message}"):
        read(write(tmp_path / "a.jsonl", row), use)


def test_training_on_prompts_is_refused(encoder):
    with pytest.raises(UserError, match="--train-on all"):
        encoder(train_on="all")


def test_an_epoch_has_every_record_once_in_any_order_and_by_process(encoder, tmp_path):
    rows = [{"prompt": "p", "chosen": "c" * (i + 1), "rejected": "d"} for i in range(10)]
    records, _ = read(write(tmp_path / "a.jsonl", *rows), DPO)
    source, _ = batches(records, encoder(), tmp_path, seed=3)
    orders = [np.concatenate([source[step]["index"] for step in range(first, first + 3)]) for first in (0, 3)]
    for order in orders:
        assert sorted(order) == [-1, -1, *range(10)]
    assert (orders[0] != orders[1]).any()
    halves = [list(iterate(source, 3, rows=rows)) for rows in (slice(0, 2), slice(2, 4))]
    for step, parts in enumerate(zip(*halves)):
        assert all(np.array_equal(np.concatenate([p[name] for p in parts]), source[step][name]) for name in parts[0])
    assert sum(source.examples(step) for step in range(3)) == 10


@pytest.mark.parametrize("names", [("anchor", "positive"), ("query", "document")])
def test_pairs_of_texts(tmp_path, names):
    first, second = names
    rows = [
        {first: "chess", second: "a tool for chess", "negative": "spam"},
        {first: "the inbox", second: "letter", "negative": ["drum"]},
        {first: "tune", second: "synth", "negative_1": "puzzle"},
    ]
    records, (findings,) = read(write(tmp_path / "a.jsonl", *rows), EMBED)
    assert findings.forms == {"-".join(names): 3}
    assert [(record.anchor, record.positive, record.negatives) for record in records] == [
        ("chess", "a tool for chess", ("spam",)),
        ("the inbox", "letter", ("drum",)),
        ("tune", "synth", ("puzzle",)),
    ]
