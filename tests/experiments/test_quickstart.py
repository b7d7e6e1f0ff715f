"""The quickstart study end to end, on a tiny model: what it writes, and that a resumed run is the same run."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

import lora_jax as lora
from experiments import run
from experiments.configs.quickstart import Config
from experiments.errors import UserError
from experiments.models import bert, classifier
from experiments.reports.page import command
from experiments.reports.table import size, spread
from experiments.studies import joint, quickstart, sentences
from experiments.studies.comparison import program, starts
from experiments.studies.problem import accuracy, answers, load
from experiments.training import record
from experiments.training.mesh_sizes import MeshSizes
from tests.experiments import official_data as official
from tests.experiments.conftest import CONFIG

pytestmark = pytest.mark.usefixtures("lenient")  # optax's Adam promotes: a float to the power of an integer


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_data):
    return Config(
        methods=("head", "lora"),
        epochs=2,
        model=str(tiny_model),
        data=str(tiny_data),
        train_examples=80,
        validation_examples=None,
        test_examples=None,
        batch_size=16,
        lengths=(12,),
        rank=2,
        alpha=4.0,
        lora_lr=0.03,
        all_linear_lr=0.03,
        full_lr=0.01,
        checkpoint_every=3,
    )


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """The config and the summaries of a run that nothing interrupted."""
    config = dataclasses.replace(settings, out=tmp_path_factory.mktemp("finished"), seeds=2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return config, quickstart.run(config)


@pytest.fixture
def config(settings, finished, tmp_path):
    """A config whose head is fitted already and whose methods are yet to run."""
    for directory in runs(finished[0], "head"):
        shutil.copytree(directory, tmp_path / "out" / directory.name)
    return dataclasses.replace(settings, out=tmp_path / "out")


def runs(config, method):
    return [path for path in config.out.iterdir() if path.name.startswith(f"{method}-")]


def values(directory, name):
    return [line[name] for line in record.read(directory / "metrics.jsonl") if name in line]


def same(one, other):
    """Checks that two summaries are of the same runs."""
    for first, second in zip(one.results, other.results, strict=True):
        measured = {"seconds": 0, "adapter_bytes": 0}  # compressed metadata varies by some bytes
        assert dataclasses.replace(first, **measured) == dataclasses.replace(second, **measured)
    if one.row.rates:
        for first, second in zip(one.directories, other.directories, strict=True):
            assert values(first, "loss") == values(second, "loss")
            assert values(first, "validation") == values(second, "validation")
            assert (first / "merged.json").read_text() == (second / "merged.json").read_text()


def test_all_methods(config, capsys):
    config = dataclasses.replace(config, methods=("head", "lora", "qlora", "qdora", "all-linear", "full"))
    summaries = quickstart.run(config)
    out = " ".join(capsys.readouterr().out.split())
    by_method = {summary.row.name: summary for summary in summaries}
    assert list(by_method) == list(config.methods)
    assert all(name in out for name in by_method)
    assert "observed: merged and unmerged predictions agree. 100.00% of the test examples" in out
    assert "LoRA is better than the head alone" in out and "QLoRA is as good as LoRA" in out
    losses, trained = {}, {name: summary.results[0].trained_parameters for name, summary in by_method.items()}
    for name in config.methods[1:]:
        (directory,) = by_method[name].directories
        assert json.loads((directory / "merged.json").read_text())["difference"] < 1e-5
        losses[name] = values(directory, "loss")
        first, second = np.mean(np.split(np.array(losses[name]), 2), axis=1)  # over the same examples
        assert second < first and len(values(directory, "validation")) == config.epochs
    head = 17 * 3
    assert trained["head"] == head
    assert trained["lora"] == trained["qlora"] == head + 2 * 2 * (16 + 16)
    assert trained["qdora"] == trained["lora"] + 2 * 16
    assert losses["qlora"] != losses["lora"]
    assert trained["all-linear"] == head + 2 * (4 * (16 + 16) + 2 * (16 + 32))

    state = {row[0]: row[2] for row in quickstart.grid(summaries).rows}
    assert state["head"] == "–" and state["lora"] == size(8 * trained["lora"] + 8)  # and two counts of steps
    written = json.loads((config.out / "run.json").read_text())
    assert [row["name"] for row in written["rows"]] == list(by_method)
    assert written["config"]["rank"] == 2 and "jax" in written["versions"]
    assert (config.out / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (config.out / "README.md").read_text()
    assert page.startswith("# quickstart\n") and "| all-linear | " in page


def test_a_mesh_computes_the_same(config, finished):
    on_mesh = dataclasses.replace(config, mesh=MeshSizes(data=2, fsdp=2), methods=("lora",))
    (summary,) = quickstart.run(on_mesh)
    one_device = finished[1][1]
    np.testing.assert_allclose(
        values(summary.directories[0], "loss"), values(one_device.directories[0], "loss"), rtol=1e-4
    )
    assert summary.results[0].test_accuracy == one_device.results[0].test_accuracy
    assert "--mesh.data 2 --mesh.fsdp 2" in command(on_mesh)
    with pytest.raises(UserError, match="batch_size 16 cannot be divided over a mesh"):
        quickstart.run(dataclasses.replace(config, mesh=MeshSizes(data=3)))


def test_pairs_of_an_official_data_set(settings, tmp_path, capsys):
    words = {"entailment": ("chess", "board"), "not_entailment": ("mail", "inbox")}
    rows = [f"{i}\t{words[label][0]} {i % 7}\t{words[label][1]}\t{label}" for i in range(24) for label in words]
    for split in ("train", "dev"):
        official.write_lines(tmp_path / "RTE" / f"{split}.tsv", ["index\tsentence1\tsentence2\tlabel", *rows])
    official.write_lines(tmp_path / "RTE" / "test.tsv", ["index\tsentence1\tsentence2", "0\tchess\tmail"])
    options = {"data": f"glue/rte:{tmp_path}", "train_examples": None, "epochs": 1, "out": tmp_path / "out"}
    head, tuned = quickstart.run(dataclasses.replace(settings, **options))
    shown = " ".join(capsys.readouterr().out.split())
    assert "the development examples take the place of test examples, and 4 of the 48 training examples" in shown
    assert "44 train, 4 validation, 48 test" in shown
    assert all(one.results[0].validation_accuracy in (0, 0.25, 0.5, 0.75, 1) for one in (head, tuned))
    (directory,) = runs(dataclasses.replace(settings, **options), "lora")
    assert sentences.load(directory)(("chess 1", "board")) in words
    official.write_glue(tmp_path / "all")
    with pytest.raises(UserError, match="the labels are numbers, expected classes"):
        quickstart.run(dataclasses.replace(settings, data=f"{tmp_path}/all/STS-B", train_examples=None))


def test_saved_adapter_gives_the_reported_accuracy(finished):
    config, (_, tuned) = finished
    problem = load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    (directory,) = runs(config, "lora-lr-0.03-seed0")
    params = lora.merge(problem.base, lora.load(directory / "adapter", problem.base))
    apply = jax.jit(problem.apply)
    logits = answers(lambda *inputs: apply(params, *inputs)[0], problem.splits["test"], problem.lengths)
    assert accuracy(logits, problem.splits["test"]) == tuned.results[0].test_accuracy
    assert not (directory / "checkpoints").exists()


def test_exported_adapter_and_head_reproduce_the_predictions(settings, finished, tmp_path, capsys):
    config = dataclasses.replace(settings, out=tmp_path / "out", export="peft")
    shutil.copytree(finished[0].out, config.out)
    _, tuned = quickstart.run(config)
    directory = next(path for path in runs(config, "lora") if "seed0" in path.name)
    assert not any((path / "peft").exists() for path in runs(config, "head"))
    assert f"PEFT: {directory / 'peft'}" in capsys.readouterr().out

    # the adapter on the published weights, and the head of the export, without the head that training began with
    problem = load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    names = classifier.encoder_names(bert.BertConfig.from_json(CONFIG))
    delta = lora.peft.load(directory / "peft", problem.base, names)
    head = load_file(directory / "peft" / "classifier.safetensors")
    assert all(path.startswith("encoder/") for path in delta) and head["weight"].shape == (3, 16)
    with safetensors.safe_open(directory / "peft" / "adapter_model.safetensors", "np") as file:
        assert all(key.startswith("base_model.model.encoder.layer.0.") for key in file.keys())  # noqa: SIM118
    adapted = jax.jit(lora.adapt(problem.apply))
    vectors = answers(lambda *x: adapted(problem.base, delta, *x)[1], problem.splits["test"], problem.lengths)
    logits = np.load(directory / "test_logits.npy")
    np.testing.assert_allclose(vectors @ head["weight"].T + head["bias"], logits, atol=1e-5)
    assert accuracy(logits, problem.splits["test"]) == tuned.results[0].test_accuracy

    readme = (directory / "peft" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    compile(code, "README.md", "exec")
    assert f'"{config.model}"' in code and "max_length=12" in code and '["games", "mail", "sound"]' in code
    quickstart.run(config)  # what was exported is replaced
    assert (directory / "peft" / "README.md").read_text() == readme


def test_a_rank_above_the_weights_is_refused_before_any_work(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(starts.head, "run", lambda *args: pytest.fail("the head was fitted"))
    for flags in (["quickstart"], ["sweep", "--ranks", "2", "999"]):
        extra = ["--rank", "999"] if flags == ["quickstart"] else []
        shared = ["--model", settings.model, "--data", settings.data, "--lengths", "12", "--train-examples", "None"]
        sizes = ["--validation-examples", "None", "--test-examples", "None"]
        status = run.main([*flags, *extra, *shared, *sizes, "--out", str(tmp_path)])
        err = capsys.readouterr().err
        assert status == 2 and "999" in err and err.count("\n") == 1, err


def test_a_sentence_is_classified_by_what_the_study_prints(finished, capsys):
    config, summaries = finished
    assert quickstart.run(config) == summaries
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (start,) = (i for i, line in enumerate(lines) if line.endswith("in Python, from here:"))
    code = lines[start + 1 :]
    assert len(code) == 2
    exec("\n".join(code), {})
    assert capsys.readouterr().out.strip() in ("games", "mail", "sound")


def test_every_method_exports_or_says_why_not(settings, finished, tmp_path, capsys):
    config = dataclasses.replace(settings, out=tmp_path / "out", export="peft", methods=("qlora", "full"), epochs=1)
    shutil.copytree(finished[0].out, config.out)
    quickstart.run(config)
    out = capsys.readouterr().out
    assert "PEFT: full fine-tuning has no adapter; its weights are in adapter/" in out
    (directory,) = runs(config, "qlora")
    assert (
        f"PEFT: {directory / 'peft'} (trained with NF4 weights; accuracy with the published float weights"
        in " ".join(out.split())
    )
    assert "trained with linear layers in NF4" in (directory / "peft" / "README.md").read_text()
    assert (directory / "peft" / "adapter_model.safetensors").exists()


class Killed(BaseException):
    """Nothing catches it."""


def kill():
    raise Killed


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("what", "raised", "resumed_at"),
    [(interrupt, KeyboardInterrupt, 8), (kill, Killed, 6)],
    ids=["interrupted", "killed"],
)
def test_resumed_run_is_the_same_run(config, finished, interrupt_many_at, capsys, what, raised, resumed_at):
    config = dataclasses.replace(config, seeds=2)
    interrupt_many_at(1, 8, what)
    with pytest.raises(raised):
        quickstart.run(config)
    summaries = quickstart.run(config)
    assert f"resumed at step {resumed_at} of 10" in capsys.readouterr().out
    for one, other in zip(summaries, finished[1], strict=True):
        same(one, other)


def test_finished_runs_are_not_repeated_unless_asked(settings, finished, monkeypatch, tmp_path):
    config = dataclasses.replace(settings, out=tmp_path / "out", seeds=2)
    shutil.copytree(finished[0].out, config.out)
    monkeypatch.setattr(joint, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    for one, other in zip(quickstart.run(config), finished[1], strict=True):
        same(one, other)
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(dataclasses.replace(config, lora_lr=1e-4))
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(dataclasses.replace(config, fresh=True))
    for name in ("result.json", "merged.json"):
        assert not any((run / name).exists() for run in runs(config, "lora-lr-0.03-seed0"))


def test_seeds_differ_and_are_summarized(finished):
    _, (head, tuned) = finished
    assert [(outcome.method, outcome.seed) for outcome in (*head.results, *tuned.results)] == [
        ("head", 0),
        ("lora", 0),
        ("lora", 1),
    ]
    assert values(tuned.directories[0], "loss") != values(tuned.directories[1], "loss")
    assert "±" in quickstart.grid([head, tuned]).rows[1][-1]


def test_interrupt_on_the_command_line(config, interrupt_many_at, capsys, monkeypatch):
    interrupt_many_at(1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    assert run.main(["quickstart"]) == 75
    assert capsys.readouterr().err == "preempted at step 2: saved; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_preempted_before_the_steps(config, capsys, monkeypatch):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    monkeypatch.setattr(program, "load", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    assert run.main(["quickstart"]) == 75
    assert capsys.readouterr().err.startswith("preempted outside of the steps")


def test_preempted_while_python_collects_garbage(config, capsys, monkeypatch):
    def once(phase, info):
        gc.callbacks.remove(once)
        os.kill(os.getpid(), signal.SIGTERM)

    def load(*args, **kwargs):
        gc.callbacks.append(once)
        gc.collect()
        time.sleep(10)

    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    monkeypatch.setattr(program, "load", load)
    assert run.main(["quickstart"]) == 75
    assert capsys.readouterr().err == "preempted outside of the steps: nothing to save; the same command resumes\n"


def test_out_of_memory_in_one_sentence(config, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.\nmore")

    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    monkeypatch.setattr(program, "load", full)
    assert run.main(["quickstart"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (RESOURCE_EXHAUSTED") and said.count("\n") == 1


def test_diverging_training_says_so(config, capsys, monkeypatch):
    config = dataclasses.replace(config, lora_lr=1e30, clip=1e30)
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    assert run.main(["quickstart"]) == 2
    assert "try smaller learning rates" in capsys.readouterr().err


def test_text_of_the_table():
    assert (size(999), size(1500), size(2.5e6), size(7e9)) == ("999 B", "1.5 kB", "2.5 MB", "7.0 GB")
    assert spread([1.0], "{:.1f}") == "1.0" and spread([1.0, 3.0], "{:.1f}") == "2.0 ± 1.4"
    (finding,) = quickstart.merged_finding([{"agreement": 0.995, "difference": 0.01}])
    assert finding.verdict == "not observed" and finding.figures.startswith("99.50% of the test examples")
    assert not quickstart.merged_finding([])
