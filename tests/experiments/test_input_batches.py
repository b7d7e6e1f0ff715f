"""Packed batches: every example once, whole and by itself; the same for any number of processes and after a restart."""

import dataclasses
import doctest
import json
import os

import numpy as np
import pytest

from experiments.errors import UserError
from experiments.input import packing, pipeline, sources, tokenized
from experiments.input.encoding import load_encoder
from experiments.input.packing import Packed, best_fit, fit_length
from experiments.input.pipeline import iterate
from experiments.input.tokenized import Tokenized, tokenize
from experiments.models import llama, location
from experiments.models.options import Options
from experiments.tasks.batching import NO_LABEL
from experiments.training.stream import Stream

LENGTH, BATCH = 16, 8


def tokenized_from(examples):
    """Examples as (tokens, targets) lists."""
    firsts = [next((i for i in range(1, len(t)) if t[i]), len(t)) for _, t in examples]
    return Tokenized(
        np.concatenate([np.array(tokens, np.uint16) for tokens, _ in examples]),
        np.concatenate([np.array(targets, bool) for _, targets in examples]),
        np.array([len(tokens) for tokens, _ in examples], np.int32),
        np.array(firsts, np.int32),
        np.arange(len(examples)),
        "digest",
    )


@pytest.fixture(scope="module")
def data():
    """100 examples of 2 to 15 tokens; the numbers of tokens say which example they are of."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 16, 100)
    return tokenized_from(
        [
            ([100 * (i + 1) + j for j in range(n)], [j >= rng.integers(1, n) for j in range(n)])
            for i, n in enumerate(sizes)
        ]
    )


def examples_of(batch):
    """(tokens, labels) of each segment of a batch, as it stands in its row."""
    for row in range(len(batch["tokens"])):
        segments = batch["segments"][row]
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert batch["positions"][row, places].tolist() == list(range(len(places)))
            yield batch["tokens"][row, places].tolist(), batch["labels"][row, places].tolist()
        padding = segments == 0
        assert not np.any(np.diff(padding.astype(int)) < 0)
        assert (batch["labels"][row, padding] == NO_LABEL).all() and not batch["tokens"][row, padding].any()


def expected_of(data, i, length=LENGTH):
    begin = int(data.lengths[:i].sum())
    tokens = data.tokens[begin : begin + data.lengths[i]].astype(int)
    labels = np.where(data.targets[begin : begin + data.lengths[i]], tokens, NO_LABEL)
    return tokens[:-1][:length].tolist(), labels[1:][:length].tolist()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("seed", [None, 3])
def test_every_example_stands_once_in_a_pass(data, seed, pack):
    packed = Packed(data, length=LENGTH, batch_size=BATCH, seed=seed, pack=pack)
    orders = []
    for epoch in range(2):
        steps = [epoch * packed.steps_per_epoch + step for step in range(packed.steps_per_epoch)]
        examples = [list(examples_of(packed[step])) for step in steps]
        assert [packed.examples(step) for step in steps] == [len(one) for one in examples]
        batches = [packed[step] for step in steps]
        assert [packed.tokens(step) for step in steps] == [np.sum(batch["segments"] > 0) for batch in batches]
        labeled = [np.sum(batch["labels"] != NO_LABEL, axis=1) for batch in batches]
        assert [packed.labels(step) for step in steps] == [rows.sum() for rows in labeled]
        assert packed.max_labels == max(rows.max() for rows in labeled)
        orders.append([tokens[0] // 100 - 1 for one in examples for tokens, _ in one])
        assert sorted(orders[-1]) == list(range(100))
        for one in examples:
            for tokens, labels in one:
                assert (tokens, labels) == expected_of(data, tokens[0] // 100 - 1)
    assert (orders[0] == orders[1]) == (seed is None)
    if not pack:
        assert packed.steps_per_epoch == 13 and (orders[0] == list(range(100))) == (seed is None)
        assert not packed[12]["segments"][4:].any()  # 100 rows: the last batch is filled up
    assert packed.fill == pytest.approx(
        (data.lengths - 1).sum() / (LENGTH * (100 if not pack else packed._rows.starts.size - 1))
    )
    assert {name: (x.dtype, x.shape) for name, x in packed[0].items()} == dict.fromkeys(
        ("tokens", "segments", "positions", "labels"), (np.int32, (BATCH, LENGTH))
    )


def test_packing_is_close_to_full():
    sizes = np.random.default_rng(0).integers(1, 200, 4000)
    rows = best_fit(sizes, 512)
    assert np.bincount(rows, sizes).max() <= 512
    assert sizes.sum() / (512 * (rows.max() + 1)) > 0.99


def test_long_examples_are_cut_and_those_with_nothing_to_learn_left_out():
    long = [*range(200, 230)]
    data = tokenized_from(
        [
            (long, [i >= 10 for i in range(30)]),
            (long, [i == LENGTH for i in range(30)]),  # the last place predicts it
            (long, [i > LENGTH for i in range(30)]),
            ([7, 8], [True, False]),  # nothing predicts the first token
            ([7, 8], [False, True]),
        ]
    )
    packed = Packed(data, length=LENGTH, batch_size=2, seed=None)
    assert (packed.num_truncated, packed.num_unused) == (2, 2)
    examples = [example for step in range(packed.steps_per_epoch) for example in examples_of(packed[step])]
    assert examples == [expected_of(data, i) for i in (0, 1, 4)]
    assert (packed.labels(0), packed.labels(1), packed.max_labels) == (LENGTH - 9 + 1, 1, LENGTH - 9)
    with pytest.raises(UserError, match="none of 5 examples has a target within 0 tokens"):
        Packed(data, length=0, batch_size=2, seed=None)


def test_the_length_is_that_of_the_data(few, encoder, tmp_path):
    data = tokenize(few, encoder, tmp_path)
    longest = int(data.lengths.max())
    assert fit_length([data], multiple=8) == -(-(longest - 1) // 8) * 8
    assert fit_length([data], longest=20) == 20
    assert Packed(data, length=fit_length([data]), batch_size=2, seed=0).num_truncated == 0
    part = data.of_first(7)
    assert part.owners.tolist() == list(range(7)) and fit_length([part, data]) == fit_length([data])
    packed = Packed(part, length=128, batch_size=1, seed=None, pack=False)
    assert packed.steps_per_epoch == 7 and packed.labels(6) == np.sum(packed[6]["labels"] != NO_LABEL)
    assert fit_length([dataclasses.replace(part, lengths=np.array([10_000]))]) == packing.LONGEST


@pytest.mark.parametrize("kind", ["packed", "stream"])
def test_a_batch_does_not_depend_on_processes_or_restarts(data, kind):
    if kind == "packed":
        source = Packed(data, length=LENGTH, batch_size=BATCH, seed=1)
    else:
        sequences = [np.arange(n, dtype=np.int32) for n in data.lengths]
        source = Stream(sequences, sequences, (8, 16), BATCH, 1)
    steps = 4 * source.steps_per_epoch
    whole = list(iterate(source, steps))
    assert len(whole) == steps

    def step(iterators):
        parts = [next(iterator) for iterator in iterators]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def processes(count, **kwargs):
        share = BATCH // count
        return [iterate(source, steps, rows=slice(i * share, (i + 1) * share), **kwargs) for i in range(count)]

    done, iterators = 0, processes(2)
    for count in (4, 1, 8, 2):  # some steps with so many processes, then the run is cut off
        for _ in range(4):
            np.testing.assert_equal(step(iterators), whole[done])
            done += 1
        states = {json.dumps(iterator.get_state()) for iterator in iterators}
        assert states == {json.dumps({"next_index": done})}
        for iterator in iterators:
            iterator.close()
        iterators = processes(count, start=0)
        for iterator in iterators:
            next(iterator)
            iterator.set_state(json.loads(next(iter(states))))
    assert done > source.steps_per_epoch
    for iterator in processes(2, start=steps):
        assert next(iterator, None) is None


@pytest.fixture(scope="module")
def few():
    return sources.first(sources.read("debian_sections", "validation"), 50)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(location.find("tiny-llama"), 1)


def test_tokens_are_written_once(tmp_path, few, encoder, monkeypatch):
    monkeypatch.setattr(tokenized, "_CHUNK", 7)
    lines = []
    data = tokenize(few, encoder, tmp_path, report=lines.append)
    (directory,) = tmp_path.iterdir()
    assert lines == [f"tokenizing 50 records into {directory}"]
    expected = encoder.encode([few[i] for i in range(50)], [""] * 50)
    np.testing.assert_array_equal(data.tokens, np.concatenate([one.tokens for one in expected]))
    np.testing.assert_array_equal(data.targets, np.concatenate([one.targets for one in expected]))
    assert data.lengths.tolist() == [len(one.tokens) for one in expected]
    assert data.firsts.tolist() == [int(np.argmax(one.targets)) for one in expected]
    assert data.tokens.dtype == np.uint16
    again = tokenize(few, encoder, tmp_path, report=lines.append)
    np.testing.assert_array_equal(again.tokens, data.tokens)
    assert len(lines) == 1
    (directory / "tokens.bin").write_bytes(b"xy")  # damaged: made again
    assert len(tokenize(few, encoder, tmp_path).tokens) == len(data.tokens)
    assert tokenize(sources.first(few, 9), encoder, tmp_path).digest != data.digest
    assert len(list(tmp_path.iterdir())) == 2


def test_processes_that_tokenize_at_once_agree(tmp_path, few, encoder, monkeypatch):
    write = tokenized._write

    killed = [tmp_path / f".{tokenize(few, encoder, tmp_path / 'other').digest[:16]}-{age}" for age in ("old", "new")]
    for directory in killed:
        directory.mkdir()
    os.utime(killed[0], (0, 0))
    calls = []

    def overtaken(directory, *args):
        write(directory, *args)
        calls.append(directory)
        if len(calls) == 1:
            tokenize(few, encoder, tmp_path)

    monkeypatch.setattr(tokenized, "_write", overtaken)
    data = tokenize(few, encoder, tmp_path)
    assert len(data) == 50 and len(set(calls)) == 2
    assert not killed[0].exists() and killed[1].exists()  # its process may still write
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_leaves_nothing_behind(tmp_path, encoder):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"x.jsonl, line 2: got prompt, expected"):
        tokenize(sources.read(str(path), "train"), encoder, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").iterdir())
    with pytest.raises(UserError, match=r"x.jsonl: cannot write tokens"):
        tokenize(sources.first(sources.read(str(path), "train"), 1), encoder, path)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_records_that_cannot_be_encoded_are_skipped(tmp_path, encoder, chunk, monkeypatch):
    monkeypatch.setattr(tokenized, "_CHUNK", chunk)
    talk = '{"messages": [{"role": "assistant", "content": "a"}]}\n'  # the checkpoint has no template
    path = tmp_path / "x.jsonl"
    path.write_text(2 * ('{"prompt": "a", "completion": "b"}\n' + talk))
    records = sources.read(str(path), "train")
    data = tokenize(records, encoder, tmp_path / "tokens", on_bad="skip")
    assert data.owners.tolist() == [0, 2] and list(data.skipped) == [1, 3]
    assert "x.jsonl, line 2: a conversation needs a chat template, but the checkpoint" in data.skipped[1]
    assert tokenize(records, encoder, tmp_path / "tokens", on_bad="skip").skipped == data.skipped
    with pytest.raises(UserError, match=r"x.jsonl, line 2: a conversation"):  # not what was skipped before
        tokenize(records, encoder, tmp_path / "tokens")
    path.write_text(talk)
    with pytest.raises(UserError, match=r"none of 1 records can be encoded; the first: .*line 1: a conversation"):
        tokenize(sources.read(str(path), "train"), encoder, tmp_path / "tokens", on_bad="skip")


def test_from_records_to_batches(tmp_path, few, encoder):
    lines = []
    packed = pipeline.batches(few, encoder, tmp_path, length=24, global_batch=4, seed=0, report=lines.append)
    assert lines[-1] == (
        f"50 examples, {packed.num_truncated} truncated to 24 tokens; {packed.steps_per_epoch} batches of 4 rows of 24 "
        f"tokens per epoch, {packed.fill:.1%} filled"
    )
    first = next(iterate(packed, packed.steps_per_epoch))
    tokens, labels = next(examples_of(first))
    begin = sum(label == NO_LABEL for label in labels)
    assert encoder.tokenizer.decode(tokens[: begin + 1]).endswith(":")
    assert encoder.tokenizer.decode(labels[begin:]).startswith(" ")


def test_examples_that_share_a_row_have_the_losses_they_have_alone(tmp_path, few, encoder):
    model = llama.load(location.find("tiny-llama"), Options(scan=True, loss_chunk=64))
    records = sources.first(few, 12)
    losses_by_tokens = []
    for pack in (True, False):
        packed = pipeline.batches(records, encoder, tmp_path, length=96, global_batch=12, seed=None, pack=pack)
        batch = packed[0]
        losses = model(batch["tokens"], batch["segments"], batch["positions"], labels_BL=batch["labels"])
        losses = np.asarray(losses) * (batch["labels"] != NO_LABEL)
        parts = [(row, number) for row in range(12) for number in range(1, batch["segments"][row].max() + 1)]
        segments = [(row, batch["segments"][row] == number) for row, number in parts]
        losses_by_tokens.append(
            {tuple(batch["tokens"][positions].tolist()): losses[positions].tolist() for positions in segments}
        )
        assert packed.steps_per_epoch == 1 and (packed.fill > 0.8) == pack
    assert len(losses_by_tokens[0]) == 12 and losses_by_tokens[0].keys() == losses_by_tokens[1].keys()
    for tokens, losses in losses_by_tokens[0].items():
        np.testing.assert_allclose(losses, losses_by_tokens[1][tokens], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [packing, pipeline])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module, extraglobs={"np": np})
    assert results.attempted and not results.failed
