"""The shipped shapes of large models: as many parameters as the models are known to have."""

import math

import jax
import pytest
from flax import nnx

from experiments.models import llama, mixtral, shapes
from experiments.models.options import Options


def build(config, rngs):
    options = Options(scan=True)
    if config["model_type"] == "mixtral":
        return mixtral.Mixtral(mixtral.MixtralConfig.from_json(config), options, rngs=rngs)
    return llama.Llama(llama.LlamaConfig.from_json(config), options, rngs=rngs)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
    ],
)
def test_parameters(name, parameters):
    assert shapes.has(name)
    model = nnx.eval_shape(lambda: build(shapes.read(name), nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_names():
    for name in shapes.NAMES:
        assert shapes.has(name) and shapes.read(name)["vocab_size"]
    for base, chat in (("Llama-2-70b-hf", "Llama-2-70b-chat-hf"), ("Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct")):
        assert shapes.read(base) == shapes.read(f"meta-llama/{chat}")
    assert not shapes.has("Meta-Llama-3-80B")


def test_a_directory_has_a_shape_of_its_own(tmp_path):
    (tmp_path / "Meta-Llama-3-8B").mkdir()
    assert not shapes.has(str(tmp_path / "Meta-Llama-3-8B"))
