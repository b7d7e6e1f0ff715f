"""The settings of supervised fine-tuning that decide where a run starts, how long it goes on, and its loss."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from rich.console import Console

import lora_jax as lora
from experiments import run
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models import location
from experiments.models.chunked_loss import cross_entropy
from experiments.studies.decoder import choices
from experiments.studies.decoder.program import check
from experiments.studies.sft import data, program, study
from experiments.training import meter, record
from experiments.training.mesh_sizes import MeshSizes
from experiments.training.optimizer import adam, learning_rate
from tests.experiments.sft_runs import TINY, adapters_equal


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Four steps an epoch of the shipped tiny Llama, two of them evaluated."""
    directory = tmp_path_factory.mktemp("settings")
    for name, count in (("train", 8), ("other", 4)):
        rows = [{"prompt": f"{name} {i}:", "completion": f" number {i} of {count}"} for i in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        model="tiny-llama",
        data=str(directory / "train.jsonl"),
        validation=str(directory / "other.jsonl"),
        out=directory / "out",
        batch=BatchSizes(2),
        length=16,
        pack=False,
        samples=0,
        rank=2,
        lr=1e-2,
    )


@pytest.fixture(scope="module")
def finished(settings):
    with jax.numpy_dtype_promotion("standard"):
        return study.run(settings)


def test_a_finished_run_goes_on(settings, finished, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, schedule="constant", warmup=0.0)
    first = study.run(config)
    longer = study.run(dataclasses.replace(config, epochs=2))
    assert longer.losses[:4] == first.losses and len(longer.losses) == 8
    at_once = study.run(dataclasses.replace(config, epochs=2, out=tmp_path / "at-once"))
    assert longer.losses == at_once.losses
    adapters_equal(lora.load(tmp_path / "adapter"), lora.load(tmp_path / "at-once" / "adapter"))
    assert study.run(config) == longer  # a shorter run is part of it
    lines = [line["step"] for line in record.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert lines == list(range(1, 9))


def test_the_batch_of_a_mesh(settings, tmp_path, capsys, monkeypatch, lenient):
    """Without --batch.global, each part of the mesh and each microbatch has one sequence."""
    monkeypatch.setenv("COLUMNS", "200")
    flags = ["--model", "tiny-llama", "--data", *settings.data, "--validation", *settings.validation, "--length", "16"]
    flags += ["--samples", "0", "--test-examples", "0", "--rank", "2", "--steps", "1", "--out", str(tmp_path)]
    assert run.main(["sft", *flags, "--mesh.data", "2", "--batch.accumulate", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "batch.global 4: the smallest for a mesh of data 2 × fsdp 1 × tensor 1 and 2 microbatches" in said
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch"] == {"global_": 4, "accumulate": 2}
    assert run.main(["sft", *flags, "--batch.accumulate", "2"]) == 2  # on one device
    assert "a finished run with batch.global 4, not 2; --fresh" in " ".join(capsys.readouterr().err.split())
    assert run.main(["sft", *flags, "--batch.accumulate", "2", "--batch.global", "4"]) == 0
    assert Config(mesh=MeshSizes(fsdp=8)).batch_size == 8 and Config().batch_size == 1


def test_validating_with_what_is_trained_on(settings, tmp_path):
    console = Console(file=io.StringIO(), width=80)
    config = dataclasses.replace(settings, out=tmp_path, validation=settings.data)
    data.read_data(config, location.find(config.model), console)
    (line,) = [line for line in console.file.getvalue().splitlines() if "also training data" in line]
    assert line.startswith(f"validation: {settings.data[0]} is also training data; its loss does not measure")


def test_going_on_needs_checkpoints(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, validation=None, steps=1)
    study.run(config)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no checkpoints to continue from step 1; --fresh starts over"):
        study.run(dataclasses.replace(config, steps=2))


def test_an_interrupted_run_is_longer_than_what_is_asked_for(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path)
    study.run(config)
    (tmp_path / "result.json").unlink()  # as if it had been killed before it wrote its result
    with pytest.raises(UserError, match="interrupted at step 4, beyond the 2 steps of this one"):
        study.run(dataclasses.replace(config, steps=2))


def test_early_stopping_exports_the_best_step(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, lr=0.5, warmup=0.0, epochs=20, eval_every=2, patience=2)
    report = study.run(config)
    losses = dict(report.evaluations)
    assert report.ended == "no better validation score in 2 evaluations"
    assert len(report.losses) == max(losses) < 80 and report.best_step == max(losses) - 4
    assert losses[report.best_step] == min(losses[step] for step in losses if step)
    model = program.abstract(config)
    base, names = model.load(location.find(config.model)), model.family.names(model.shape)
    for exported, stored in (("peft", "adapter-best"), ("peft-last", "adapter")):
        merged = lora.merge(base, lora.peft.load(tmp_path / exported, base, names))
        jax.tree.map(np.testing.assert_array_equal, merged, lora.merge(base, lora.load(tmp_path / stored)))
    assert study.run(config).ended == report.ended  # shown, not trained on


def test_a_run_ends_when_its_time_is_over(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, epochs=100, max_minutes=1e-3)
    report = study.run(config)
    assert report.ended == "0.001 minutes are over"
    assert 1 <= len(report.losses) < 10 and report.evaluations[-1][0] == len(report.losses)
    assert (tmp_path / "peft-last" / "adapter_config.json").exists()


@pytest.mark.parametrize("form", ["adapter", "peft"])
def test_a_run_starts_from_an_adapter(settings, finished, tmp_path, form, lenient):
    config = dataclasses.replace(settings, out=tmp_path, rank=16, init_from=settings.out / form)
    report = study.run(config)
    assert report.evaluations[0][1] == pytest.approx(finished.evaluations[-1][1], rel=1e-5)
    assert {adapter.rank for adapter in lora.load(tmp_path / "adapter").values()} == {2}


def test_what_a_run_cannot_start_from(settings, tmp_path):
    with pytest.raises(UserError, match=r"expected a directory with adapter\.json .* or adapter_config\.json"):
        program.abstract(dataclasses.replace(settings, rank=16, init_from=tmp_path))
    (tmp_path / "adapter-best").mkdir()
    (tmp_path / "adapter-best" / "adapter.json").touch()
    with pytest.raises(UserError, match=r"adapters are in .*/adapter-best$"):  # the directory of a run
        check(dataclasses.replace(settings, rank=16, init_from=tmp_path))
    with pytest.raises(ValueError, match="--init-from: the adapter determines method, rank;"):
        dataclasses.replace(settings, init_from=tmp_path, method="dora")


def test_a_peft_adapter_that_parts_a_tied_head(settings, tmp_path):
    numbers = np.random.default_rng(0)
    factors = {"lora_A": numbers.normal(size=(2, 64)), "lora_B": numbers.normal(size=(512, 2))}
    tensors = {f"base_model.model.lm_head.{name}.weight": factor.astype("float32") for name, factor in factors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["lm_head"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    config = dataclasses.replace(settings, model="tiny-gpt2", rank=16, init_from=tmp_path)
    with pytest.raises(
        UserError, match=r"changes lm_head alone, but head and embedding .* are one weight; merge the"
    ) as e:
        program.abstract(config)
    assert "\n" not in str(e.value)
    assert program.abstract(dataclasses.replace(config, model="tiny-llama")).delta.keys() == {"output/kernel"}


def test_ranks_by_pattern(settings):
    config = dataclasses.replace(settings, ranks=("query|value=3", "down=5"))
    delta = program.abstract(config).delta
    ranks = {path.split("/")[-2]: adapter.rank for path, adapter in delta.items()}
    assert ranks == {"query": 3, "value": 3, "key": 2, "output": 2, "gate": 2, "up": 2, "down": 5}
    scale = lora.init(jax.random.key(0), {"query": jnp.ones((8, 8))}, {"query": lora.LoRA(3, 32.0, axes=("in", "out"))})
    assert float(scale["query"].scale) == pytest.approx(32 / 3)
    # All of a target, as in the help text.
    config = dataclasses.replace(settings, ranks=("attention=4", "feed_forward/down=1"))
    delta = program.abstract(config).delta
    ranks = {path.split("/")[-2]: adapter.rank for path, adapter in delta.items()}
    assert ranks == {"query": 4, "value": 4, "key": 4, "output": 4, "gate": 2, "up": 2, "down": 1}
    with pytest.raises(UserError, match=r"ranks: 'embedding' matches no adapted weight; these are adapted: .*/key/ke"):
        program.abstract(dataclasses.replace(settings, ranks=("embedding=3",)))
    with pytest.raises(UserError, match="ranks: 'query' matches only weights that an earlier pattern matches"):
        program.abstract(dataclasses.replace(settings, ranks=("attention=3", "query=4")))


def test_query_and_value_of_a_fused_kernel():
    config = Config(model="tiny-gpt2", targets=("value", "query"), rank=2, ranks=("qkv=3",), length=64)
    (adapter,) = program.abstract(config).delta.values()
    layers, rank, width = adapter.a.shape[0], 3, adapter.a.shape[-1]
    assert adapter.blocks == (True, False, True)
    assert adapter.a.shape == adapter.b.shape == (layers, 2, rank, width)
    whole = program.abstract(dataclasses.replace(config, targets=("attention",))).delta["layers/attention/qkv/kernel"]
    assert whole.blocks == (True,) and whole.b.shape == (layers, rank, 3 * width)


def test_the_weights_that_doras_authors_adapt():
    config = Config(model="tiny-llama", targets=("query", "key", "value", "up", "down"), length=64)
    paths = {path.removesuffix("/kernel").rpartition("layers/")[2] for path in program.abstract(config).delta}
    assert paths == {
        *(f"attention/{name}" for name in ("query", "key", "value")),
        "feed_forward/up",
        "feed_forward/down",
    }


def test_evaluations_have_a_share_of_the_time(settings, tmp_path, capsys, lenient):
    config = dataclasses.replace(settings, out=tmp_path, eval_share=0.3, steps=2)
    console = Console(file=io.StringIO(), width=200)
    directory = location.find(config.model)
    read = data.read_data(config, directory, console)
    assert read.validation_examples == 1 and read.validation.steps_per_epoch == 1
    assert "an evaluation reads 1 of 4 records, since all evaluations take at most 30%" in console.file.getvalue()
    assert len(read.records) == 4  # prompts of the samples
    for share, steps, first, count in ((0.9, 4, False, 4), (0.5, 4, True, 2), (0.1, 2, True, 1)):
        config = dataclasses.replace(settings, eval_share=share, steps=steps, eval_first=first)
        assert data.read_data(config, directory, console).validation_examples == count
    assert data.read_data(config, directory, console, evaluated=3).validation_examples == 3
    for off in ({"eval_share": 0.0}, {"validation_examples": 0}):
        read = data.read_data(dataclasses.replace(settings, **off), directory, console)
        assert read.validation is None and len(read.records) > 0


def test_nothing_is_evaluated(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, steps=2, eval_share=0.0)
    report = study.run(config)
    assert report.evaluations == [] and len(report.losses) == report.best_step == 2
    assert study.run(dataclasses.replace(config, eval_share=0.2)) == report


def test_the_learning_rate_of_a_model():
    console = Console(file=io.StringIO(), width=200)
    llama = {"model_type": "llama", "hidden_size": 576}
    rates = {lr: choices.choose_rate(Config(lr=lr), llama, console) for lr in (None, "auto", 0.5)}
    assert rates == {None: 3e-3, "auto": 1.3e-3, 0.5: 0.5}
    assert choices.choose_rate(Config(model="other"), {"model_type": "qwen3", "hidden_size": 4096}) == 4.7e-4
    assert choices.choose_rate(Config(model="tiny-gpt2"), {"model_type": "gpt2", "n_embd": 2000}) == 5e-4
    printed = console.file.getvalue().splitlines()
    assert printed == [
        "lr 0.003: the best of short runs of smollm2-135m",
        "lr 0.0013: the published rule for LoRA on a model of hidden size 576",
    ]


def test_the_length_comes_from_the_data(settings, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    config = dataclasses.replace(settings, length=None)
    read = data.read_data(config, location.find(config.model), console, longest=20)
    assert read.train.length == 20 and "length 20: the longest example has 18 tokens" in console.file.getvalue()
    config = dataclasses.replace(settings, length=16)
    data.read_data(config, location.find(config.model), console)
    assert "train: warning: 8 of 8 records (100%) are longer than 16 tokens" in console.file.getvalue()
    assert "; --length 17 keeps everything" in console.file.getvalue()


def test_a_share_is_held_out(settings, tmp_path, lenient):
    config = dataclasses.replace(settings, out=tmp_path, validation=None, validation_share=0.25, steps=1)
    report = study.run(config)
    assert len(report.evaluations) == 2
    assert study.loop.plan_steps(1, 3)[0] == 3  # 6 of 8 examples, in batches of 2
    assert len(study.run(dataclasses.replace(config, steps=None)).losses) == 3


def test_loss_is_logged_every_n_steps(settings, tmp_path, lenient):
    report = study.run(dataclasses.replace(settings, out=tmp_path, epochs=2, log_every=4))
    lines = [line for line in record.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 4, 8]
    assert lines[1]["loss"] == pytest.approx(np.mean(report.losses[1:4]))


def test_label_smoothing_is_torch_s():
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(1, 5, 7)), jnp.float32), jnp.array([[0, 3, -100, 6, 1]])
    losses = cross_entropy(lambda x: x, x, labels, chunk=2, smoothing=0.1)
    # torch.nn.functional.cross_entropy(x[0], labels[0], reduction="none", label_smoothing=0.1)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 7), 0.1)
    expected = jnp.where(labels >= 0, optax.softmax_cross_entropy(x, targets), 0)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_noise_and_smoothing_act_in_training_alone(settings):
    config = dataclasses.replace(settings, neftune=5.0, label_smoothing=0.1)
    noisy, plain = program.abstract(config), program.abstract(settings)
    with jax.set_mesh(plain.mesh):
        base = plain.load(location.find(settings.model))
        delta = plain.create(jax.random.key(0), base).delta
    batch = {name: jnp.ones((2, 16), jnp.int32) for name in ("tokens", "segments", "labels")}
    batch["positions"] = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (2, 16))
    one, other = jax.random.key(1), jax.random.key(2)
    with jax.set_mesh(plain.mesh):
        evaluated = [float(model.loss(base, delta, batch, None)[0]) for model in (noisy, plain)]
        noisy_losses = [float(noisy.loss(base, delta, batch, key)[0]) for key in (one, one, other)]
        plain_loss = float(plain.loss(base, delta, batch, one)[0])
    assert evaluated[0] == evaluated[1] == pytest.approx(plain_loss, rel=1e-6)
    assert noisy_losses[0] == noisy_losses[1] != noisy_losses[2] and plain_loss not in noisy_losses


def test_weight_decay_leaves_magnitudes(lenient):
    base = {"w": jax.random.normal(jax.random.key(0), (8, 8))}
    delta = lora.init(jax.random.key(1), base, {"w": lora.DoRA(2, 4, axes=("in", "out"))})
    train, _ = lora.partition(delta)
    tx = adam(1e-2, 100, warmup=0.0, clip=None, weight_decay=0.5)
    state = tx.init(train)
    zeros = jax.tree.map(jnp.zeros_like, train)
    updates, _ = tx.update(zeros, state, train)
    assert not np.any(updates["w"].magnitude) and np.all(updates["w"].a)


def test_schedules():
    steps = [0, 5, 10, 55, 99]
    rates = {
        name: [float(learning_rate(1.0, 100, warmup=0.1, schedule=name, floor=0.2, decay=0.3)(step)) for step in steps]
        for name in ("linear", "cosine", "constant", "wsd")
    }
    np.testing.assert_allclose(rates["linear"], [0, 0.5, 1, 0.6, 0.2 + 0.8 / 90], rtol=1e-5)
    np.testing.assert_allclose(rates["cosine"][:4], [0, 0.5, 1, 0.6], rtol=1e-5)
    np.testing.assert_allclose(rates["constant"], [0, 0.5, 1, 1, 1], rtol=1e-5)
    np.testing.assert_allclose(rates["wsd"], [0, 0.5, 1, 1, 0.2 + 0.8 / 30], rtol=1e-5)


def test_warmup_in_steps():
    for warmup, expected in ((0.5, [0, 0.1, 0.8]), (5, [0, 0.2, 8 / 15]), (50, [0, 0.05, 0.6])):
        rate = learning_rate(1.0, 20, warmup=warmup)
        np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 12)], expected, atol=1e-6)


def test_a_loss_that_is_not_finite_names_its_cause():
    metrics = {"loss": np.float32("nan"), "grad_norm": np.float32(1), "nonfinite": {}}
    with pytest.raises(UserError, match="step 1; the weights or the data are the cause, not the learning rate"):
        meter.check_finite(1, metrics)
    with pytest.raises(UserError, match="step 2; try a smaller learning rate"):
        meter.check_finite(2, metrics)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "attention"], "ranks: expected PATTERN=RANK, as in attention=8, got 'attention'"),
        (["--ranks", "(=8"], "ranks: '(' is not a valid regular expression"),
        (["--length", "1000000000000"], "length must be below 2**31"),
        (["--decay", "0"], "decay must be a fraction of the steps, above 0 and at most 1, not 0.0"),
        (["--validation-share", "0.1"], "--validation-share 0.1: "),
        (["--data", "PLAIN", "--patience", "1"], "--patience: PLAIN has no validation examples; name some with"),
        (["--data", "PLAIN", "--eval-every", "1"], "--eval-every: PLAIN has no validation examples"),
        (["--length", "256"], "length 256: tiny-llama supports sequences of up to 128 tokens"),
        (["--data", "PLAIN:nan"], "PLAIN:nan: invalid weight nan; expected a positive number, as in PLAIN:2"),
        (["--template", "no.jinja"], "--template no.jinja: no such file"),
        (["--template-arguments", "1"], "--template-arguments: expected a JSON object or NAME=VALUE, got '1'"),
        (["--init-from", "nowhere"], "--init-from nowhere: no such directory"),
        (["--validation-examples", "-1"], "validation_examples must not be negative or infinite, got -1"),
        (["--eval-share", "1"], "eval_share must be a fraction, at least 0 and below 1, not 1.0"),
        (["--eval-share", "0", "--patience", "2"], "patience: eval_share or validation_examples is 0, so nothing is"),
    ],
)
def test_what_a_user_can_put_right(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "a", "completion": " b"}\n')
    flags, message = [flag.replace("PLAIN", str(plain)) for flag in flags], message.replace("PLAIN", str(plain))
    sizes = ["--length", "128", "--batch.global", "8", "--train-examples", "8"]
    tiny = TINY[:2] if "--data" in flags else TINY
    assert run.main(["sft", *tiny, *sizes, "--out", str(tmp_path / "out"), "--samples", "0", *flags]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
