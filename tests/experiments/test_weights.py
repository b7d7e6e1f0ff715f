"""Parameters by path."""

import doctest

import jax.numpy as jnp

import lora_jax as lora
from experiments.models import weights


def test_a_quantized_weight_is_one_leaf():
    base = lora.quantize(
        {"layer": {"kernel": jnp.ones((64, 4)), "bias": jnp.zeros(4)}}, {"kernel": lora.NF4(axes=("in", "out"))}
    )
    flat = weights.flatten_weights(base)
    assert {path: leaf.shape for path, leaf in flat.items()} == {"layer/kernel": (64, 4), "layer/bias": (4,)}
    assert weights.map_weights(lambda path, leaf: (path, weights.is_quantized(leaf)), base) == {
        "layer": {"kernel": ("layer/kernel", True), "bias": ("layer/bias", False)}
    }


def test_examples():
    results = doctest.testmod(weights)
    assert results.attempted and not results.failed
