"""The study of embeddings end to end on a tiny model: what it measures and writes, resumed, on a mesh, quantized."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import lora_jax as lora
from experiments import run
from experiments.configs.embed import Config
from experiments.models import bert, classifier
from experiments.objectives.contrastive import embeddings
from experiments.studies.embed import study, training
from experiments.studies.embed.pairs import PairStream, read
from experiments.studies.embed.retrieval import rank_answers
from experiments.tasks import text
from experiments.training import mesh as meshes
from experiments.training.mesh import MeshSizes
from tests.experiments.conftest import CONFIG, FILLERS, WORDS

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Queries with a word of each topic, which the answer repeats among other words."""
    directory, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("train", 44), ("validation", 8), ("test", 12)):
        rows = []
        for _ in range(count):
            words = [str(rng.choice(topic)) for topic in WORDS.values()]
            fillers = [str(word) for word in rng.choice(FILLERS, 4)]
            rows.append({"prompt": " ".join([*fillers, *words]), "completion": " ".join([*words, fillers[0]])})
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="module")
def settings(tiny_model, data):
    return Config(
        model=str(tiny_model),
        data=(str(data),),
        train_examples=None,
        validation_examples=None,
        batch_size=8,
        lengths=(10,),
        answer_length=8,
        epochs=2,
        rank=2,
        lora_lr=0.03,
        full_lr=0.003,
        checkpoint_every=3,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, study.run(config)


def directory_of(config, method):
    return next(path for path in config.out.iterdir() if path.name.startswith(f"{method}-"))


def command(config, monkeypatch):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    return run.main(["embed"])


def test_base_and_methods_are_measured_on_the_same_queries(finished):
    config, results = finished
    assert [result.method for result in results] == ["base", "lora", "full"]
    for result in results[1:]:
        assert len(result.losses) == 2 * 6  # the last batch of a pass has four pairs
        assert np.mean(result.losses[6:]) < np.mean(result.losses[:6])
        assert [step for step, _ in result.evaluations] == [0, 6, 12]
    assert results[1].trained_parameters == 2 * (4 * (16 + 16) + 2 * (16 + 32))
    record = json.loads((config.out / "run.json").read_text())
    for result, row in zip(results, record["results"]):
        hits = np.array(result.ranks) < 1
        assert row["recall@1"]["value"] == hits.mean()
        assert row["recall@1"]["error"] == pytest.approx(np.sqrt(hits.mean() * (1 - hits.mean()) / 12))
        if result.losses:
            change = hits * 1.0 - (np.array(results[0].ranks) < 1)
            assert row["gain@1"]["value"] == pytest.approx(change.mean())
            assert row["gain@1"]["error"] == pytest.approx(change.std(ddof=1) / np.sqrt(12))
    assert (config.out / "embed.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_adapter_gives_the_reported_ranks(finished):
    config, (_, result, _) = finished
    tokenizer = text.load_tokenizer(training.Path(config.model))
    pairs = read(config, tokenizer, str)["test"]
    apply, base = lora.nnx.functional(bert.load(training.Path(config.model)))
    names = classifier.encoder_names(bert.BertConfig.from_json(CONFIG), "")
    delta = lora.peft.load(directory_of(config, "lora") / "peft", base, names)
    embed = jax.jit(embeddings(apply))

    def vectors(texts):
        padded = np.zeros((len(texts), 10), np.int32)
        for row, tokens in enumerate(texts):
            padded[row, : len(tokens)] = tokens
        return np.asarray(embed(lora.merge(base, delta), {}, padded, padded > 0))

    ranks, nearest = rank_answers(
        vectors(pairs.queries), vectors(pairs.answers), [pair.positive for pair in pairs.texts]
    )
    assert ranks.tolist() == result.ranks and nearest.tolist() == result.nearest


def test_a_resumed_run_is_the_same_run(settings, finished, tmp_path, interrupt_at, monkeypatch, capsys):
    config = dataclasses.replace(settings, out=tmp_path, methods=("lora",))
    interrupt_at(8, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert command(config, monkeypatch) == 130
    interrupt_at(0, None)
    _, resumed = study.run(config)
    assert "resumed at step 8 of 12" in capsys.readouterr().out
    assert dataclasses.replace(resumed, seconds=0) == dataclasses.replace(finished[1][1], seconds=0)
    base = lora.nnx.functional(bert.load(training.Path(config.model)))[1]
    one, other = (lora.load(directory_of(c, "lora") / "adapter", base) for c in (config, finished[0]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_runs_are_shown_again(finished, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(finished[0], out=tmp_path / "out")
    shutil.copytree(finished[0].out, config.out)
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert study.run(config) == finished[1]
    assert "points of recall@1; the aim of +5 points is" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):
        study.run(dataclasses.replace(config, temperature=0.1))


def test_a_mesh_and_a_quantized_base(settings, finished, tmp_path):
    mesh = MeshSizes(data=2, fsdp=2)
    config = dataclasses.replace(settings, out=tmp_path / "mesh", methods=("lora",), mesh=mesh, steps=1)
    _, sharded = study.run(config)
    np.testing.assert_allclose(sharded.losses[0], finished[1][1].losses[0], rtol=1e-5)  # negatives of the whole batch
    config = dataclasses.replace(settings, out=tmp_path / "int8", methods=("lora",), quantize="int8", steps=1)
    _, quantized = study.run(config)
    assert quantized.method == "lora, int8 base" and quantized.losses[0] != finished[1][1].losses[0]
    np.testing.assert_allclose(quantized.losses[0], finished[1][1].losses[0], rtol=0.1)


def test_a_batch_has_queries_and_answers_in_the_same_order(settings):
    tokenizer = text.load_tokenizer(training.Path(settings.model))
    pairs = read(settings, tokenizer, str)["train"]
    negatives = np.random.default_rng(0).permutation(len(pairs))[:, None]
    candidates = [(answer, pairs.answers[index]) for answer, (index,) in zip(pairs.answers, negatives)]
    stream = PairStream(pairs, candidates, (8, 10), settings.answer_length, 8, seed=0)
    number_of = {tuple(query.tolist()): number for number, query in enumerate(pairs.queries)}
    of_query = {tuple(query.tolist()): answer for query, answer in zip(pairs.queries, pairs.answers)}
    rows = 0
    for step in range(stream.steps_per_epoch):
        batch = stream[step]
        for index in range(8):
            query = batch["tokens"][index][batch["mask"][index]]
            answer = batch["document_tokens"][index, 0][batch["document_mask"][index, 0]]
            assert bool(len(query)) == bool(len(answer))
            if len(query):
                np.testing.assert_array_equal(answer, of_query[tuple(query.tolist())])
                negative = batch["document_tokens"][index, 1][batch["document_mask"][index, 1]]
                expected = pairs.answers[negatives[number_of[tuple(query.tolist())], 0]]
                np.testing.assert_array_equal(negative, expected)
                rows += 1
        part = stream.rows(step, slice(4, 8))
        np.testing.assert_array_equal(part["document_tokens"], batch["document_tokens"][4:])
    assert rows == len(pairs)


def test_negatives_of_records_come_before_mined_ones(settings, data, tmp_path):
    mined = {"anchor": "a tool chess", "positive": "chess"}
    rows = [
        {**mined, "negative": "puzzle"},
        {"anchor": "new inbox", "positive": "inbox"},
        {"query": "fast drum", "document": "drum", "negatives": ["tune", "synth"]},
        {"messages": [{"role": "user", "content": "spam"}, {"role": "assistant", "content": "simple letter"}]},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {split: (str(data / f"{split}.jsonl"),) for split in ("validation", "test")}
    config = dataclasses.replace(settings, data=(str(tmp_path / "train.jsonl"),), **held_out)
    directory = training.Path(config.model)
    tokenizer = text.load_tokenizer(directory)
    pairs = read(config, tokenizer, str)["train"]
    encoder = training.Encoder(directory, config, meshes.make_mesh(MeshSizes()))
    of_count = {count: encoder.find_candidates(pairs, count) for count in (0, 1, 2)}
    words = {
        count: [[tokenizer.decode(tokens[1:-1].tolist()) for tokens in one] for one in candidates]
        for count, candidates in of_count.items()
    }
    assert [one[0] for one in words[0]] == ["chess", "inbox", "drum", "simple letter"] and len(words[0][0]) == 1
    assert words[1][0] == ["chess", "puzzle"] and words[1][2] == ["drum", "tune"]
    assert words[2][2] == ["drum", "tune", "synth"]
    for one in (words[1][1], words[2][0], words[2][3]):
        assert one[-1] in ("chess", "inbox", "drum", "simple letter") and one[-1] != one[0]


def test_what_the_user_can_put_right_is_one_sentence(settings, data, tmp_path, monkeypatch, capsys):
    rated = tmp_path / "rated.jsonl"
    rated.write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 4)
    alone = (str(data / "train.jsonl"),)
    for change, message in (
        ({"data": alone}, "train.jsonl: no validation data next to the training data; name some with --validation"),
        ({"data": alone, "validation": (str(data / "validation.jsonl"),)}, "no test data next to the training data"),
        ({"test": alone}, "train.jsonl: training data cannot be test data"),
        (
            {"test": (str(rated),)},
            "rated.jsonl, line 1: an answer with a label (prompt, completion and label), which embed does not",
        ),
        ({"test_examples": 1}, "expected at least two test pairs, got 1"),
        ({"rank": 99}, "lora: "),
        ({"lengths": (30,)}, "has only 24 positions"),
        ({"mesh": MeshSizes(data=3)}, "batch_size 8 cannot be divided over a mesh"),
    ):
        assert command(dataclasses.replace(settings, out=tmp_path / "out", **change), monkeypatch) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    monkeypatch.undo()
    for flags, message in (
        (["--batch-size", "1"], "batch_size must be at least 2"),
        (["--methods", "lora,lo"], "unknown method 'lo'"),
    ):
        assert run.main(["embed", *flags]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_fast_is_the_smallest_complete_run(tmp_path):
    config = Config(fast=True, out=tmp_path, steps=1)
    assert (config.steps, config.methods, config.out) == (1, ("lora",), tmp_path)  # what is set otherwise stays
    assert Config(fast=True).out != Config().out
