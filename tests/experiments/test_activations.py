"""The estimated memory of activations, and what is rematerialized because of it."""

import dataclasses
import doctest
import io

import jax
import pytest
from rich.console import Console

import lora_jax as lora
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.models import activations, families
from experiments.studies.decoder import choices
from experiments.studies.decoder.program import read_description
from experiments.studies.sft import program
from experiments.training.mesh import MeshSizes


def stored_bytes(config):
    """The bytes that the forward pass of a step stores for the backward pass."""
    parts = program.abstract(config, max_labels=8)
    train, frozen = lora.partition(parts.delta)

    def backward(base, train, frozen, batch):
        return jax.vjp(lambda train: parts.loss(base, lora.join(train, frozen), batch, None)[0], train)[1]

    with jax.set_mesh(parts.mesh):
        residuals = jax.eval_shape(backward, parts.base, train, frozen, parts.batch())
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(residuals)), parts.shape


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_the_estimate_is_that_of_the_residuals(model):
    config = Config(model=model, length=64, batch=BatchSizes(2), remat="full", lr=1e-3)
    least, shape = stored_bytes(config)  # without activations of layers, but with the weights
    for remat in ("none", "dots"):
        measured = stored_bytes(dataclasses.replace(config, remat=remat))[0] - least
        estimate = activations.activation_bytes(shape, 2, 64, 4, remat)
        assert 0.7 < estimate / measured < 1.3


def test_memory_decides_what_is_rematerialized(monkeypatch):
    description = read_description("smollm2-135m")
    shape = families.get_family(description).shape(description)
    weights = choices.count_weights(description)
    assert weights == 134_515_008

    def choose(gigabytes, **fields):
        monkeypatch.setattr(choices, "device_memory", lambda devices: gigabytes * 1e9 / devices)
        config = Config(length=512, **{"batch": BatchSizes(2), **fields})
        return choices.choose_remat(config, shape, weights, console=console)

    console = Console(file=io.StringIO(), width=200)
    assert [choose(memory) for memory in (16, 6, 1)] == ["none", "dots", "full"]
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "remat none: about 3.9 GB of activations, 0.54 GB of weights, 16 GB of memory"
    assert choose(6, dtype="bfloat16") == choose(6, batch=BatchSizes(2, accumulate=2)) == "none"
    assert choose(12, mesh=MeshSizes(data=2)) == "none"  # a row on each
    assert choose(1, remat="none") == "none"
    assert choices.choose_remat(Config(length=512), shape, weights, "tpu") == "full"
    monkeypatch.undo()
    assert choices.device_memory(1) > 1e9


def test_examples_in_docstrings():
    assert doctest.testmod(activations).failed == 0
