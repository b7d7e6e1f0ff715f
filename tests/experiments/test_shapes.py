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
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
    ],
)
def test_parameters(name, parameters):
    assert shapes.has(name)
    model = nnx.eval_shape(lambda: build(shapes.read(name), nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters
