"""Frozen leaves of an adapter have no gradient, whatever the caller differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

RECIPES = {
    "LoRA": lora.LoRA(2, alpha=4, dropout=0.1),
    "LoRA blocks": lora.LoRA(2, blocks=2),
    "DoRA": lora.DoRA(2, alpha=4, dropout=0.1),
    "VeRA": lora.VeRA(2, dropout=0.1),
    "LoRAFA": lora.LoRAFA(2, alpha=4),
    "AdaLoRA": lora.AdaLoRA(2),
    "LoHa": lora.LoHa(2, alpha=4),
    "LoKr": lora.LoKr(2, alpha=4),
    "IA3": lora.IA3(),
    "Full": lora.Full(),
    "Rows": lora.Rows([0, 2]),
}


def fn(base, x):
    return jnp.tanh(x @ base["w"])


@pytest.fixture(params=RECIPES)
def problem(request, getkey):
    base, x = {"w": jax.random.normal(getkey(), (6, 4))}, jax.random.normal(getkey(), (3, 6))
    delta = lora.init(getkey(), base, {"w": RECIPES[request.param]}, fn, x)
    train, frozen = lora.partition(delta)
    train = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(getkey(), leaf.shape), train)
    return base, lora.join(train, frozen), x, getkey()


def through(name, base, x, key):
    def adapted(delta):
        return lora.adapt(fn)(base, delta, x, dropout_key=key)

    def merged(delta):
        return fn(lora.merge(base, delta), x)

    def routed(delta):
        stacked = jax.tree.map(lambda leaf: leaf[None], delta)
        return lora.route(lora.adapt(fn))(base, stacked, jnp.zeros(3, jnp.int32), x)

    return {"adapted": adapted, "merge": merged, "route": routed}[name]


@pytest.mark.parametrize("name", ["adapted", "merge", "route"])
def test_frozen_leaves_have_no_gradient(name, problem):
    base, delta, x, key = problem

    def loss(delta):
        return jnp.sum(through(name, base, x, key)(delta) ** 2)

    gradient = jax.grad(loss, allow_int=True)(delta)
    train, frozen = lora.partition(delta)
    of_train = jax.grad(lambda train: loss(lora.join(train, frozen)))(train)
    for trains, whole, leaf in zip(*map(jax.tree.leaves, (lora.trainable_mask(delta), gradient, delta)), strict=True):
        if not trains and whole.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(whole, jnp.zeros_like(leaf))
    expected = jax.tree.leaves(of_train)
    assert expected and any(bool(jnp.any(leaf != 0)) for leaf in expected)
    for ours, alone in zip(jax.tree.leaves(lora.partition(gradient)[0]), expected, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adapted", "merge"])
def test_a_tangent_of_frozen_leaves_changes_nothing(name, problem):
    base, delta, x, key = problem

    def tangent_of(trains, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, jax.dtypes.float0)  # all that jvp takes of an integer
        return jnp.zeros_like(leaf) if trains else jnp.ones_like(leaf)

    tangent = jax.tree.map(tangent_of, lora.trainable_mask(delta), delta)
    _, out = jax.jvp(through(name, base, x, key), (delta,), (tangent,))
    np.testing.assert_array_equal(out, jnp.zeros_like(out))
