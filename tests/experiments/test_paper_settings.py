"""Comparisons on GLUE's tasks: their metrics, the settings of papers, and what a user can put right."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from experiments import flags, run
from experiments.configs import glue, low_data, papers, rank, subspaces, which_weights
from experiments.configs.glue import Config
from experiments.configs.low_data import Config as LowData
from experiments.evaluation import tasks
from experiments.input import labeled
from experiments.models import bert, classifier
from experiments.reports.page import command
from experiments.studies import glue as study
from experiments.studies import glue_results
from experiments.studies import low_data as low_data_study
from experiments.studies import rank as rank_study
from experiments.studies.comparison import paper
from experiments.studies.comparison.description import Row
from experiments.studies.glue import STUDY
from experiments.studies.problem import Problem, load
from tests.experiments import official_data as official
from tests.experiments.conftest import CONFIG, WORDS, bert_tensors, write_model

pytestmark = pytest.mark.usefixtures("lenient")

ROBERTA = CONFIG | {"model_type": "roberta", "max_position_embeddings": 26, "pad_token_id": 1}


def texts(rng):
    """Two texts, and whether both are about the same topic."""
    topics = rng.choice(list(WORDS), size=2)
    topics[1] = topics[0] if rng.random() < 0.5 else topics[1]
    first, second = (" ".join(rng.choice(WORDS[topic], size=3)) for topic in topics)
    return first, second, int(topics[0] == topics[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """GLUE's CoLA, MRPC and STS-B with tiny texts, whose test labels are secret."""
    root, rng = tmp_path_factory.mktemp("glue"), np.random.default_rng(0)
    headers = {
        "CoLA": [],
        "MRPC": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"],
        "STS-B": ["index\tsentence1\tsentence2\tscore"],
    }
    for split, count in (("train", 80), ("dev", 40)):
        rows = {name: list(header) for name, header in headers.items()}
        for index in range(count):
            first, second, same = texts(rng)
            rows["CoLA"].append(f"x\t{same}\t\t{first} {second}")
            rows["MRPC"].append(f"{same}\t1\t2\t{first}\t{second}")
            rows["STS-B"].append(f"{index}\t{first}\t{second}\t{4 * same + rng.random():.3f}")
        for name, lines in rows.items():
            official.write_lines(root / name / f"{split}.tsv", lines)
    official.write_lines(root / "CoLA" / "test.tsv", ["index\tsentence", "0\tchess"])
    official.write_lines(root / "MRPC" / "test.tsv", ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1\t2\ta\ta"])
    official.write_lines(root / "STS-B" / "test.tsv", ["index\tsentence1\tsentence2", "0\tchess\tmail"])
    return root


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("roberta"), bert_tensors(ROBERTA), ROBERTA)


@pytest.mark.parametrize(
    ("name", "metric", "titles"),
    [
        ("cola", "matthews", ("development Matthews correlation, %",)),
        ("mrpc", "accuracy", ("development accuracy, %", "F1, %")),
        ("stsb", "pearson", ("development Pearson correlation, %", "Spearman correlation, %")),
    ],
)
def test_a_task_has_its_metrics(name, metric, titles, data, tiny_model, tmp_path, capsys):
    shared = {"methods": ("head", "lora"), "lengths": (6,) if name == "cola" else (14,)}
    config = Config(fast=True, model=str(tiny_model), data=f"glue/{name}:{data}", out=tmp_path)
    study.run(dataclasses.replace(config, **shared))
    printed = " ".join(capsys.readouterr().out.split())
    assert ("of the texts have 6 tokens or more; the tokens beyond are dropped" in printed) == (name == "cola")
    assert "the development examples take the place of test examples, and 8 of the 80 training examples" in printed
    page, record = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "run.json").read_text())
    assert all(f" {title} |" in page for title in titles)
    assert "32 development" in page and "held out from training" in page
    head, adapted = record["rows"]
    (directory,) = tmp_path.glob(f"lora-*-lr-{adapted['results'][0]['lr']:g}-seed0-*")
    labels = labeled.load(config.data, "validation", 32).labels
    expected = tasks.evaluate(f"glue/{name}", np.load(directory / "test_predictions.npy"), labels)
    assert adapted["metric"] == metric == next(iter(expected))
    assert adapted["mean"] == pytest.approx(expected.pop(metric)) == 100 * adapted["results"][0][f"test_{metric}"]
    assert adapted["others"] == pytest.approx(expected) and head["others"].keys() == expected.keys()
    assert set(adapted["tried"]) == {"0.001", "0.003"}


def test_nothing_is_selected_on_the_reported_examples(data, tiny_model):
    name = f"glue/mrpc:{data}"
    splits = labeled.load_splits(name, dict.fromkeys(("train", "validation", "test")))
    train, development = labeled.load(name, "train"), labeled.load(name, "validation")
    assert [len(split) for split in splits.values()] == [72, 8, 40]
    assert sorted(splits["train"].texts + splits["validation"].texts) == sorted(train.texts)
    assert splits["test"].texts == development.texts and splits["test"].is_development
    assert labeled.load_splits(name, {"test": 5})["test"].texts == development.texts[:5]
    few = labeled.load_splits(name, {"train": 10, "validation": 3, "test": 4})
    assert [len(split) for split in few.values()] == [10, 3, 4]
    with pytest.raises(ValueError, match="train without 8 held-out examples: expected at least 80 examples, got 72"):
        labeled.load_splits(name, {"train": 80, "validation": None, "test": None})
    lines = {split: (data / "MRPC" / f"{split}.tsv").read_text().splitlines() for split in ("train", "dev")}
    for split, content in lines.items():
        official.write_lines(data / "labeled" / f"{split}.tsv", content)
    official.write_lines(data / "labeled" / "msr_paraphrase_test.txt", lines["dev"][:9])
    name, limits = f"glue/mrpc:{data}/labeled", dict.fromkeys(splits)
    assert [len(split) for split in labeled.load_splits(name, limits).values()] == [80, 40, 8]
    assert [len(split) for split in labeled.load_splits(name, limits, development=True).values()] == [72, 8, 40]
    problem = load(str(tiny_model), f"glue/stsb:{data}", dict.fromkeys(splits), (14,), str, regression=True)
    assert problem.reported == "development" and problem.task.is_regression and problem.names == ()
    assert jax.tree.leaves(problem.base["classifier"])[0].shape == (1,)


LORA = {  # LoRA paper, tables 9 and 10; MNLI, SST-2, MRPC, CoLA, QNLI, QQP, RTE, STS-B
    "roberta-base": {
        "epochs": "30 60 30 80 25 25 80 40",
        "batch_size": "16 16 16 32 32 16 32 16",
        "lr": "5 5 4 4 4 5 5 4",
        "lengths": "512 512 512 512 512 512 512 512",
        "weight_decay": ".1 .1 .1 .1 .1 .1 .1 .1",
    },
    "roberta-large": {
        "epochs": "10 10 20 20 10 20 20 30",
        "batch_size": "4 4 4 4 4 4 8 8",
        "lr": "3 4 3 2 2 3 4 2",
        "lengths": "128 128 512 128 512 512 512 512",
        "weight_decay": ".1 .1 .1 .1 .1 .1 .1 .1",
    },
    "roberta-large-houlsby": {
        "epochs": "10 10 20 20 10 20 20 10",
        "batch_size": "4 4 4 4 4 4 4 4",
        "lr": "3 4 3 2 2 3 4 2",
        "lengths": "128 128 128 128 128 128 128 128",
        "weight_decay": ".1 .1 .1 .1 .1 .1 .1 .1",
    },
    "deberta-xxl": {
        "epochs": "5 16 30 10 8 11 11 10",
        "batch_size": "8 8 32 4 6 8 4 4",
        "lr": "1 .6 2 1 1 1 2 2",
        "lengths": "256 128 128 64 512 320 320 128",
        "weight_decay": "0 .01 .01 0 .01 .01 .01 .1",
    },
}
OTHERS = {"roberta-base": (8, 8, 0.06), "deberta-xxl": (16, 32, 0.1)}  # rank, alpha, warmup
TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
MEANS = {  # of table 2
    ("roberta-base", "full fine-tuning"): 86.4,
    ("roberta-base", "BitFit"): 85.2,
    ("roberta-base", "AdapterDrop, size 48, 4 layers"): 84.4,
    ("roberta-base", "AdapterDrop, size 48, 12 layers"): 85.4,
    ("roberta-base", "LoRA on query and value, r = 8"): 87.2,
    ("roberta-large", "full fine-tuning"): 88.9,
    ("roberta-large", "LoRA on query and value, r = 8"): 89.0,
    ("roberta-large-houlsby", "LoRA on query and value, r = 8"): 88.6,
    ("roberta-large-houlsby", "Pfeiffer adapters, size 64"): 88.4,
    ("roberta-large-houlsby", "Pfeiffer adapters, size 16"): 87.9,
    ("roberta-large-houlsby", "Houlsby adapters, size 64"): 87.8,
    ("roberta-large-houlsby", "Houlsby adapters, size 8"): 86.4,
    ("deberta-xxl", "full fine-tuning"): 91.1,
    ("deberta-xxl", "LoRA on query and value, r = 16"): 91.3,
}


@pytest.mark.parametrize("name", LORA)
def test_a_setting_has_the_values_of_its_table(name):
    for index, task in enumerate(TASKS):
        config = Config(paper=name, model="some/model", data=f"glue/{task}").preset()
        for field, text in LORA[name].items():
            value = {"lr": 1e4 * config.lr[0], "lengths": config.lengths[-1]}.get(field, getattr(config, field))
            assert value == pytest.approx(float(text.split()[index])), (task, field)
        assert (config.ranks[0], config.alpha, config.warmup) == OTHERS.get(name, (8, 16, 0.06))
        assert (config.train_examples, config.label_smoothing, config.seeds) == (None, 0, 5)


@pytest.mark.parametrize(("name", "row"), MEANS)
def test_the_values_of_the_paper_have_the_means_of_its_table(name, row):
    values = []
    for task in TASKS:
        config = Config(paper=name, model="some/model", data=f"glue/{task}").preset()
        ours, other = paper.rows(config, [Row(row, {}, (1e-3,), paper="x"), Row("prompt of 8", {}, (1e-3,), paper="x")])
        assert other.paper == ""
        values.append(float(ours.paper.split()[0]))
    assert np.mean(values) == pytest.approx(MEANS[name, row], abs=0.051)
    assert paper.heading(config).endswith(", STS-B")


def test_the_rows_of_a_setting_have_the_counts_of_the_paper():
    shape = bert.BertConfig(50265, 768, 12, 12, 3072, 514, 1, pad_token_id=1, model_type="roberta")
    network = nnx.eval_shape(
        lambda: classifier.SentenceClassifier(bert.Bert(shape, rngs=nnx.Rngs(0)), 768, 2, rngs=nnx.Rngs(0))
    )
    apply, base = lora.nnx.functional(network)
    problem = Problem(apply, base, {}, ("a", "b"), (14,), network.encoder.shape, "")
    config = Config(paper="roberta-base", model="some/model", data="glue/rte").preset()
    by_name = {row.name: row.spec for row in study.rows(config, problem)}
    drop = [f"AdapterDrop, size 48, {layers} layers" for layers in (4, 12)]
    assert list(by_name) == ["head alone", "BitFit", "full fine-tuning", "LoRA on query and value, r = 8", *drop]

    def count(name):
        delta = jax.eval_shape(lambda base: problem.delta(jax.random.key(0), base, by_name[name]), base)
        leaves = jax.tree.leaves(lora.partition(delta)[0])
        return sum(math.prod(leaf.shape) for leaf in leaves) - (768 + 1) * 2

    assert count("LoRA on query and value, r = 8") == 294_912
    assert count("BitFit") == 102_144
    assert [count(name) for name in drop] == [298_176, 894_528]


def test_rows_have_hyperparameters_of_their_own():
    def rows(names, task="mnli", name="roberta-large-houlsby", **fields):
        usual = Config(paper=name, model="some/model", data=f"glue/{task}").preset()
        return paper.rows(dataclasses.replace(usual, **fields), [Row(row, {}, (2e-4,)) for row in names])

    adapters = [f"{kind} adapters, size {size}" for kind in ("Pfeiffer", "Houlsby") for size in (64, 8)]
    assert [(row.rates, row.epochs, row.batch_size) for row in rows(adapters)] == [
        ((3e-5,), 10, 32),
        ((3e-4,), 5, 32),
        ((3e-5,), 10, 32),
        ((3e-4,), 10, 32),
    ]
    assert [(row.rates, row.epochs) for row in rows(adapters, "rte")] == [((3e-4,), 20)] * 4
    (row,) = rows(adapters[:1], epochs=1, lr=(1e-3,))  # flags win
    assert (row.rates, row.epochs, row.batch_size) == ((2e-4,), None, 32)
    (row,) = rows(adapters[:1], full_lr=(1e-5,))  # the flag of another rate
    assert row.rates == (3e-5,)
    (full,) = rows(["full fine-tuning"], name="roberta-base")
    assert full.epochs == 10 and full.rates == (2e-4,)
    fast = Config(paper="roberta-base", model="a/b", data="glue/rte", fast=True).preset()
    assert paper.rows(fast, [full])[0] == dataclasses.replace(full, paper="78.7") and fast.epochs == 1
    (full,) = paper.rows(fast, [Row("full fine-tuning", {}, (1e-5,))])
    assert full.epochs is None


def test_gpt3_is_for_other_models_on_mnli():
    chosen = {"paper": "gpt-3", "model": "some/model", "data": "glue/mnli"}
    for kind in (which_weights.Config, rank.Config, LowData, Config):
        config = kind(**chosen).preset()
        assert (config.batch_size, config.epochs, config.weight_decay, config.alpha) == (128, 2, 0.1, 8)
        assert np.atleast_1d(config.lr).tolist() == [2e-4]
    few = LowData(**chosen).preset()
    assert (few.sizes[:3], few.size_epochs, few.full_lr) == ((100, 1000, 10_000), (40, 40, 4, 2), (5e-6,))
    by_size = paper.rows(few, [Row(f"prefix tuning, {size:,} examples", {}, (1.0,)) for size in few.sizes])
    assert [row.batch_size for row in by_size] == [20, 20, 100, None]
    others = [Row("BitFit", {}, (1.0,), paper="71.3"), Row("prompt of 8", {}, (1.0,))]
    usual = Config(**chosen).preset()
    first, second = paper.rows(usual, others)
    assert (first.rates, second.rates, first.paper) == ((1.6e-3,), (5e-4,), "71.3")
    assert [row.rates for row in paper.rows(dataclasses.replace(usual, full_lr=(1.0,)), others)] == [
        first.rates,
        second.rates,
    ]
    assert [row.rates for row in paper.rows(dataclasses.replace(usual, lr=(1.0,)), others)] == [(1.0,), second.rates]
    assert paper.heading(few) == "" and paper.heading(usual) == "paper: GPT-3 175B, MNLI"
    assert rank.Config(paper="gpt-3", data="glue/mnli").preset().model == rank.DEFAULTS.model  # any encoder


def test_the_table_has_the_result_of_the_task():
    chosen = {"paper": "gpt-3", "data": "glue/mnli"}
    name = "LoRA on query and value, r = 8"
    assert glue_results.of(Config(), name) == "RoBERTa 87.2; GPT-3 73.8 / 91.6"
    assert glue_results.of(Config(**chosen), name) == "91.6"
    shape = SimpleNamespace(width=16, layers=1)
    problem = SimpleNamespace(shape=shape)
    by_name = {row.name: row.paper for row in rank_study.rows(rank.Config(ranks=(1, 16)), problem)}
    assert by_name["query, value, r = 1"] == "73.4 / 91.3; E2E 68.72" and by_name["query, r = 16"] == ""
    assert by_name["query, value, r = 16"] == "E2E 69.61"
    alone = {row.name: row.paper for row in rank_study.rows(rank.Config(**chosen), problem)}
    assert alone["query, value, r = 1"] == "91.3" and alone["query, value, r = 64"] == "91.4"
    few = {row.name: row.paper for row in low_data_study.rows(LowData(**chosen).preset(), problem)}
    assert few["LoRA, 10,000 examples"] == "89.2" and few["full fine-tuning, 391,702 examples"] == "89.5"


def test_values_that_are_defaults_win_over_the_paper():
    config = Config(paper="roberta-base", model="some/model", data="glue/rte").preset()
    ours = dataclasses.replace(config, epochs=1, alpha=32.0, seeds=3)
    assert (config.epochs, ours.epochs, ours.alpha, ours.seeds) == (80, 1, 32, 3)
    with pytest.raises(ValueError, match=r"paper must be one of roberta-base, .*, not roberta"):
        Config(paper="roberta")


def test_flags_win_over_the_paper():
    chosen = ["--paper", "roberta-large", "--model", "some/model", "--data", "glue/cola"]

    def parsed(*args):
        config = flags.parse(glue.DEFAULTS, "glue", [*chosen, *args])
        return flags.parse(config.preset(), "glue", [*chosen, *args])

    usual, ours = parsed(), parsed("--epochs", "1", "--batch-size", "16", "--methods", "lora,full")
    assert (usual.epochs, usual.batch_size, usual.lr, str(usual.out)) == (
        20,
        4,
        (2e-4,),
        "runs/glue-roberta-large-cola",
    )
    assert (ours.epochs, ours.batch_size, ours.lr, ours.methods) == (1, 16, (2e-4,), ("lora", "full"))
    named = "--model some/model --data glue/cola"
    assert command(usual) == f"python -m experiments.run glue {named} --paper roberta-large"
    changed = f"{named} --epochs 1 --batch-size 16 --paper roberta-large --methods lora full"
    assert command(ours) == f"python -m experiments.run glue {changed}"
    assert dataclasses.replace(ours, seed=3).epochs == 1
    fast = parsed("--fast", "--alpha", "3", "--seeds", "3")
    assert (fast.epochs, fast.train_examples, fast.ranks, fast.alpha, fast.lr) == (1, 48, (2,), 3, (2e-4,))
    assert (fast.seeds, str(fast.out)) == (3, "runs/glue-roberta-large-cola-fast")
    changed = f"--fast {named} --seeds 3 --alpha 3.0 --paper roberta-large"
    assert command(fast) == f"python -m experiments.run glue {changed}"


def test_a_study_in_the_setting_of_its_paper(data, roberta, tmp_path, capsys):
    args = ["--paper", "roberta-base", "--fast", "--model", roberta, "--data", f"glue/mrpc:{data}", "--out", tmp_path]
    assert run.main(["glue", *map(str, args), "--methods", "full,lora,adapter-drop", "--full-lr", "1e-3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "Setting: LoRA, table 9, RoBERTa-base." in printed and "Alpha is the table's 8; the scripts have 16" in printed
    )
    assert "The paper's model has a width of 768, this one 16." in printed
    page = (tmp_path / "README.md").read_text()
    assert "| paper: RoBERTa-base, MRPC |" in page and "| 90.2 |" in page
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    assert (config["weight_decay"], config["alpha"], config["lr"], config["batch_size"]) == (0.1, 8.0, [4e-4], 16)


def test_what_the_user_can_put_right_is_one_sentence(data, tiny_model, tmp_path, capsys):
    cola = ["--data", f"glue/cola:{data}"]
    model = ["--model", str(tiny_model)]
    for args, message in (
        (
            ["glue", "--paper", "roberta-base"],
            "needs --model, RoBERTa-base: a directory or FacebookAI/",
        ),
        (["glue", "--paper", "roberta-base", *model], "needs --data, one of GLUE's tasks: glue/mnli:DIRECTORY, or"),
        (["glue", "--paper", "roberta-base", *model, *cola], "is of the type bert, expected RoBERTa-base"),
        (["rank", "--paper", "gpt-3", *model, *cola], "has no setting for"),
        (["glue", *model, "--paper"], "--paper needs a name: roberta-base, roberta-large, roberta-large-houlsby"),
        (["rank", "--paper", *model], "--paper needs a name: gpt-3"),
        *(
            ([name, "--paper", "lora"], "Unrecognized options: --paper, lora")
            for name in ("dora", "rank-selection", "sweep", "intrinsic", "quickstart")
        ),
        (["glue", "--methods", "lora,lor"], "unknown method 'lor'"),
        (["glue", "--paper", "roberta"], "roberta-base"),
    ):
        assert run.main([*args, "--out", str(tmp_path / "out")]) == 2, args
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split()), args


def test_every_setting_fits_its_config():
    for kind in (Config, which_weights.Config, rank.Config, LowData, subspaces.Config):
        assert kind.PRESETS.keys() == set(get_args(get_args(get_type_hints(kind)["paper"])[0]))
        for preset in kind.PRESETS.values():
            fields = {field.name for field in dataclasses.fields(kind)}
            assert all(preset.fields(task).keys() <= fields for task in preset.tasks)
            assert all(isinstance(note, str) and note.endswith(".") for note in preset.notes)
    assert papers.lengths(64) == (32, 64) and low_data.DEFAULTS.paper is None and STUDY.claim
