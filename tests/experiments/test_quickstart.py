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
from rich.console import Console
from safetensors.numpy import load_file

import lora_jax as lora
from experiments import run
from experiments.configs.quickstart import Config
from experiments.errors import UserError
from experiments.models import bert, classifier
from experiments.reports.results import Result
from experiments.reports.table import merged_line, size, spread, table
from experiments.studies import methods, quickstart, sentences
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
    """The config and the results of a run that nothing interrupted."""
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


def same(one, other):
    assert one.losses == other.losses
    assert one.evaluations == other.evaluations
    assert one.test_accuracy == other.test_accuracy and one.merged_difference == other.merged_difference


def test_all_methods(config, capsys):
    config = dataclasses.replace(config, methods=("head", "lora", "qlora", "qdora", "all-linear", "full"))
    results = quickstart.run(config)
    out = capsys.readouterr().out
    by_method = {result.method: result for result in results}
    assert list(by_method) == list(config.methods)
    assert all(name in out for name in by_method)
    assert "merged and unmerged predictions agree: 100.00%" in out
    for name in config.methods[1:]:
        assert by_method[name].merged_difference < 1e-5
        first, second = np.mean(np.split(np.array(by_method[name].losses), 2), axis=1)  # over the same examples
        assert second < first
        assert by_method[name].evaluations[0] == (0, by_method["head"].validation_accuracy)
        assert by_method[name].adam_bytes >= 8 * by_method[name].trained_parameters
    head = 17 * 3
    assert by_method["head"].trained_parameters == head and by_method["head"].adam_bytes is None
    assert by_method["lora"].trained_parameters == head + 2 * 2 * (16 + 16)
    assert by_method["qlora"].trained_parameters == by_method["lora"].trained_parameters
    assert by_method["qdora"].trained_parameters == by_method["lora"].trained_parameters + 2 * 16
    assert by_method["qlora"].losses != by_method["lora"].losses
    assert by_method["all-linear"].trained_parameters == head + 2 * (4 * (16 + 16) + 2 * (16 + 32))

    record = json.loads((config.out / "run.json").read_text())
    assert [result["method"] for result in record["results"]] == list(by_method)
    assert record["config"]["rank"] == 2 and "jax" in record["versions"]
    assert (config.out / "curves.png").read_bytes().startswith(b"\x89PNG")


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
    assert all(result.validation_accuracy in (0, 0.25, 0.5, 0.75, 1) for result in (head, tuned))
    (directory,) = runs(dataclasses.replace(settings, **options), "lora")
    assert sentences.load(directory)(("chess 1", "board")) in words
    official.write_glue(tmp_path / "all")
    with pytest.raises(UserError, match="the labels are numbers, expected classes"):
        quickstart.run(dataclasses.replace(settings, data=f"{tmp_path}/all/STS-B", train_examples=None))


def test_saved_adapter_gives_the_reported_accuracy(finished):
    config, (_, result, _) = finished
    problem = quickstart.load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    (directory,) = runs(config, "lora-seed0")
    params = lora.merge(problem.base, lora.load(directory / "adapter", problem.base))
    apply = jax.jit(problem.apply)
    logits = methods.answers(lambda *inputs: apply(params, *inputs)[0], problem.splits["test"], problem.lengths)
    assert methods.accuracy(logits, problem.splits["test"]) == result.test_accuracy
    assert not (directory / "checkpoints").exists()


def test_exported_adapter_and_head_reproduce_the_predictions(settings, finished, tmp_path, capsys):
    config = dataclasses.replace(settings, out=tmp_path / "out", export="peft")
    shutil.copytree(finished[0].out, config.out)
    quickstart.run(config)
    directory = next(path for path in runs(config, "lora") if "seed0" in path.name)
    assert not any((path / "peft").exists() for path in runs(config, "head"))
    assert f"PEFT: {directory / 'peft'}" in capsys.readouterr().out

    # the adapter on the published weights, and the head of the export, without the head that training began with
    problem = quickstart.load(config.model, config.data, dict.fromkeys(("train", "test")), config.lengths, str)
    names = classifier.encoder_names(bert.BertConfig.from_json(CONFIG))
    delta = lora.peft.load(directory / "peft", problem.base, names)
    head = load_file(directory / "peft" / "classifier.safetensors")
    assert all(path.startswith("encoder/") for path in delta) and head["weight"].shape == (3, 16)
    with safetensors.safe_open(directory / "peft" / "adapter_model.safetensors", "np") as file:
        assert all(key.startswith("base_model.model.encoder.layer.0.") for key in file.keys())  # noqa: SIM118
    adapted = jax.jit(lora.adapt(problem.apply))
    vectors = methods.answers(lambda *x: adapted(problem.base, delta, *x)[1], problem.splits["test"], problem.lengths)
    logits = np.load(directory / "test_logits.npy")
    np.testing.assert_allclose(vectors @ head["weight"].T + head["bias"], logits, atol=1e-5)
    assert methods.accuracy(logits, problem.splits["test"]) == Result.load(directory / "result.json").test_accuracy

    readme = (directory / "peft" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    compile(code, "README.md", "exec")
    assert f'"{config.model}"' in code and "max_length=12" in code and '["games", "mail", "sound"]' in code
    quickstart.run(config)  # what was exported is replaced
    assert (directory / "peft" / "README.md").read_text() == readme


def test_a_rank_above_the_weights_is_refused_before_any_work(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart.head, "run", lambda *args: pytest.fail("the head was fitted"))
    for flags in (["quickstart"], ["sweep", "--ranks", "2", "999"]):
        extra = ["--rank", "999"] if flags == ["quickstart"] else []
        shared = ["--model", settings.model, "--data", settings.data, "--lengths", "12", "--train-examples", "None"]
        sizes = ["--validation-examples", "None", "--test-examples", "None"]
        status = run.main([*flags, *extra, *shared, *sizes, "--out", str(tmp_path)])
        err = capsys.readouterr().err
        assert status == 2 and "999" in err and err.count("\n") == 1, err


def test_a_sentence_is_classified_by_what_the_study_prints(finished, capsys):
    config, results = finished
    assert quickstart.run(config) == results
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    code = lines[lines.index("in Python, from here:") + 1 :]
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
def test_resumed_run_is_the_same_run(config, finished, interrupt_at, capsys, what, raised, resumed_at):
    interrupt_at(8, what)
    with pytest.raises(raised):
        quickstart.run(config)
    interrupt_at(0, None)
    head, resumed = quickstart.run(config)
    assert f"resumed at step {resumed_at} of 10" in capsys.readouterr().out
    same(head, finished[1][0])
    same(resumed, finished[1][1])


def test_finished_runs_are_not_repeated_unless_asked(settings, finished, monkeypatch, tmp_path):
    config = dataclasses.replace(settings, out=tmp_path / "out", seeds=2)
    shutil.copytree(finished[0].out, config.out)
    monkeypatch.setattr(methods, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    for one, other in zip(quickstart.run(config), finished[1], strict=True):
        same(one, other)
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(dataclasses.replace(config, lora_lr=1e-4))
    with pytest.raises(pytest.fail.Exception):
        quickstart.run(dataclasses.replace(config, fresh=True))
    assert not any((run / "result.json").exists() for run in runs(config, "lora-seed0"))


def test_seeds_differ_and_are_summarized(finished):
    _, results = finished
    assert [(result.method, result.seed) for result in results] == [("head", 0), ("lora", 0), ("lora", 1)]
    assert results[1].losses != results[2].losses
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table(results))
    assert "±" in captured.get()


def test_interrupt_on_the_command_line(config, interrupt_at, capsys, monkeypatch):
    interrupt_at(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    assert run.main(["quickstart"]) == 75
    assert capsys.readouterr().err == "preempted at step 2: saved; the same command resumes\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_preempted_before_the_steps(config, capsys, monkeypatch):
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    monkeypatch.setattr(quickstart, "load", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
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
    monkeypatch.setattr(quickstart, "load", load)
    assert run.main(["quickstart"]) == 75
    assert capsys.readouterr().err == "preempted outside of the steps: nothing to save; the same command resumes\n"


def test_out_of_memory_in_one_sentence(config, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.\nmore")

    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    monkeypatch.setattr(quickstart, "load", full)
    assert run.main(["quickstart"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (RESOURCE_EXHAUSTED") and said.count("\n") == 1


def test_diverging_training_says_so(config, capsys, monkeypatch):
    config = dataclasses.replace(config, lora_lr=1e30, clip=1e30)
    monkeypatch.setattr("tyro.cli", lambda *args, **kwargs: config)
    assert run.main(["quickstart"]) == 2
    assert "try a smaller learning rate" in capsys.readouterr().err


def test_text_of_the_table():
    assert (size(999), size(1500), size(2.5e6), size(7e9)) == ("999 B", "1.5 kB", "2.5 MB", "7.0 GB")
    assert spread([1.0], "{:.1f}") == "1.0" and spread([1.0, 3.0], "{:.1f}") == "2.0 ± 1.4"
    result = Result(
        method="lora",
        seed=0,
        trained_parameters=1,
        adapter_bytes=9,
        seconds=1.0,
        validation_accuracy=0.5,
        test_accuracy=0.5,
        lr=1e-3,
        adam_bytes=8,
        merged_difference=0.01,
        merged_agreement=0.995,
        losses=[1.0],
        evaluations=[(0, 0.5)],
    )
    assert merged_line([result]).startswith("merged and unmerged predictions differ: 99.50%")
