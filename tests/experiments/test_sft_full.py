"""Full fine-tuning by sft: its runs, its memory, and what becomes of its weights."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from experiments import run
from experiments.configs import dpo, sft
from experiments.configs.decoder import BatchSizes
from experiments.errors import Preempted
from experiments.models import families, location
from experiments.models.flops import count_flops
from experiments.studies.decoder import choices
from experiments.studies.decoder.program import read_description
from experiments.studies.sft import evaluation, held_out, program, study
from experiments.studies.sft.report import ADAPTER, BEST, PEFT
from experiments.training.interrupt import Interrupt
from tests.experiments.sft_runs import adapters_equal

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its report."""
    config = dataclasses.replace(
        sft.DEFAULTS,
        model="tiny-llama",
        data=("debian_sections",),
        method="full",
        train_examples=32,
        validation_examples=2,
        eval_share=0.9,
        test_examples=2,
        samples=0,
        new_tokens=4,
        length=32,
        batch=BatchSizes(4),
        steps=4,
        out=tmp_path_factory.mktemp("full"),
    )
    with jax.numpy_dtype_promotion("standard"):
        return config, study.run(config)


def test_all_weights_are_trained(finished):
    config, report = finished
    delta = lora.load(config.out / ADAPTER)
    base = program.abstract(config).base
    assert {adapter.kind for adapter in delta.values()} == {"Full"}
    assert report.trained_parameters == sum(leaf.size for leaf in jax.tree.leaves(base))
    assert report.evaluations[-1][1] < report.evaluations[0][1]


def test_an_interrupted_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished[0], out=tmp_path)
    monkeypatch.setattr(Interrupt, "requested", lambda self, step: step == 2)
    with pytest.raises(Preempted):
        study.run(config)
    monkeypatch.undo()
    assert study.run(config).losses == finished[1].losses
    adapters_equal(*(lora.load(out / ADAPTER) for out in (tmp_path, finished[0].out)))


def test_the_merged_model_answers_as_the_trained_one(finished, tmp_path, capsys):
    config, _ = finished
    (tuned,) = evaluation.run(config, held_out.find_held_out(config), config.out / BEST, with_base=False)
    assert run.main(["merge", "--adapter", str(config.out), "--out", str(tmp_path / "merged")]) == 0
    merged = dataclasses.replace(config, model=str(tmp_path / "merged"), method="lora", out=tmp_path)
    alone, *_ = evaluation.run(merged, held_out.find_held_out(merged), None)
    np.testing.assert_allclose(alone.perplexity, tuned.perplexity, rtol=1e-6)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert weights.keys() == load_file(location.find("tiny-llama") / "model.safetensors").keys()


def test_there_is_no_peft_export(finished, capsys, monkeypatch):
    config, report = finished
    monkeypatch.setattr(study, "_train", lambda *args: pytest.fail("trained again"))
    assert study.run(config) == report
    printed = " ".join(capsys.readouterr().out.split())
    assert "PEFT's format holds no weights that are trained in full; the model to serve is written by" in printed
    assert f"merge --adapter {config.out / BEST}" in printed and not (config.out / PEFT).exists()


def test_a_run_starts_from_trained_weights(finished, tmp_path):
    start = finished[0].out / BEST
    config = dataclasses.replace(finished[0], method="lora", init_from=start, out=tmp_path, steps=1)
    report = study.run(config)
    assert report.trained_parameters == finished[1].trained_parameters
    np.testing.assert_allclose(report.evaluations[0][1], min(loss for _, loss in finished[1].evaluations), rtol=1e-6)
    assert choices.choose_rate(config, {"model_type": "llama", "hidden_size": 2000}) == 5e-5


def test_the_learning_rate_is_that_of_full_fine_tuning():
    config, llama = sft.Config(method="full"), {"model_type": "llama", "hidden_size": 2000}
    assert config.model in config.SWEPT and choices.choose_rate(config, llama) == 5e-5
    assert dpo.Config().lr == 1e-3 and choices.choose_rate(dpo.Config(method="full"), llama) == 5e-5


@pytest.mark.parametrize(("on_host", "copies"), [(False, 4), (True, 2)])
def test_memory_counts_gradients_and_optimizer_state(monkeypatch, on_host, copies):
    description = read_description("tiny-llama")
    shape, weights = families.get_family(description).shape(description), 10**9
    config = sft.Config(length=512, method="full", optimizer_on_host=on_host)
    activations = choices.activation_bytes(shape, 1, 512, 4, "none", flash=False)
    for spare, fits in ((2.1, True), (0.5, False)):
        memory = (1 + copies) * 4 * weights + spare * activations
        monkeypatch.setattr(choices, "device_memory", lambda devices, memory=memory: memory)
        assert (choices.choose_remat(config, shape, weights) == "none") == fits
        assert choices.choose_remat(dataclasses.replace(config, method="lora"), shape, weights) == "none"


def test_operations_of_a_step(finished):
    config, _ = finished
    full = program.abstract(config)
    base, shape = full.base, full.shape
    one, other = (count_flops(base, delta, shape, 32) for delta in (full.delta, {}))
    assert one.label == 1.5 * other.label
    attention = 6 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * 32
    assert one.token - attention == pytest.approx(1.5 * (other.token - attention))


def test_it_is_compared_with_adapters(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    config, _ = finished
    flags = ["--model", config.model, "--data", "debian_sections", "--fast", "--length", "32", "--batch.global", "4"]
    flags += ["--methods", "lora,full", "--rank", "2", "--train-examples", "32", "--out", str(tmp_path)]
    assert run.main(["sft", *flags]) == 0
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["name"] for row in rows] == ["lora", "full"]
    assert rows[0]["trained_parameters"] < rows[1]["trained_parameters"]
    assert re.search(r"^ *full +139,584 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "4", "--alpha", "8"], "method full trains all weights and has no rank, alpha; drop --rank and"),
        (["--quantize", "nf4"], "method full trains the weights, of which quantize nf4 stores codes; use quantize"),
        (["--init-from", "x"], "--init-from: the adapter determines method"),
    ],
)
def test_what_a_user_can_put_right(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert run.main(["sft", "--method", "full", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "full", "--rank", "8"], "method full trains all weights and has no rank; drop --rank"),
        (["--methods", "lora", "--quantize", "nf4"], "instead of --quantize nf4, use --methods qlora"),
        (["--methods", "dora,lora", "--quantize", "nf4"], "instead of --quantize nf4, use --methods qlora,qdora"),
        (["--methods", "lora", "--quantize", "int8"], "run --quantize int8 without --methods"),
        (["--methods", "lora", "--method", "dora"], "instead of --method dora, use --methods dora"),
        (["--methods", "lora", "--init-from", "x"], "drop --init-from, or --methods"),
    ],
)
def test_settings_that_exclude_methods(flags, message, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert run.main(["sft", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
