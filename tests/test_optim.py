"""partition(), join(), masks and the one-tree optimizer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.throwaway import PickedRecipe

import lora_jax as lora


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["v"]


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (4, 6)), "v": jax.random.normal(getkey(), (6, 3)), "count": jnp.int32(3)}


@pytest.fixture
def delta(base, getkey):
    spec = {"^w$": lora.LoRA(2, alpha=4, dropout=0.1), "^v$": PickedRecipe(("in", "out"))}
    return lora.init(getkey(), base, spec, fn, jnp.ones((2, 4)))


def test_partition_and_join(delta):
    train, frozen = lora.partition(delta)
    assert train["w"].scale is None and frozen["w"].a is None
    assert train["v"].picked is None, "integers never train"
    chex.assert_trees_all_equal(lora.join(train, frozen), delta)
    assert jax.tree.structure(lora.join(train, frozen)) == jax.tree.structure(delta)
    with pytest.raises(ValueError, match="both halves"):
        lora.join(train, delta)
    with pytest.raises(ValueError, match="'w'"):
        lora.join(train, {"v": frozen["v"]})


def test_mask(base, delta):
    mask = lora.trainable_mask({"base": base, "delta": delta})
    assert mask["base"] == {"w": False, "v": False, "count": False}
    assert (mask["delta"]["w"].a, mask["delta"]["w"].scale, mask["delta"]["v"].picked) == (True, False, False)
    state = optax.masked(optax.adam(1e-3), lora.trainable_mask).init(delta)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained_size(delta)


def trained_size(delta):
    return sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0]))


def test_one_tree_style(base, delta, getkey):
    x = jax.random.normal(getkey(), (5, 4))
    tx = lora.optimizer(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0, momentum=0.9)))
    tree = {"base": base, "delta": delta}
    state = tx.init(tree)
    # State bytes: one float32 slot for each trained element, nothing else.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * trained_size(delta)

    adapted = lora.adapt(fn)
    loss = lambda tree: 1e3 * jnp.sum(adapted(tree["base"], tree["delta"], x) ** 2)  # noqa: E731
    gradients = jax.grad(loss, allow_int=True)(tree)
    updates, state = tx.update(gradients, state, tree)
    moved = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(moved["base"], base)
    chex.assert_trees_all_equal(lora.partition(moved["delta"])[1], lora.partition(delta)[1])
    assert (moved["delta"]["w"].b != delta["w"].b).any()
    # The clip measured the trainable gradients alone: their update has exactly the norm that it allows.
    train = lora.partition(updates["delta"])[0]
    np.testing.assert_allclose(optax.tree.norm(train), 1e-3, rtol=1e-4)

    # The same numbers as in the two-tree style.
    part, frozen = lora.partition(delta)
    two = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0, momentum=0.9))
    grads = jax.grad(lambda part: loss({"base": base, "delta": lora.join(part, frozen)}))(part)
    expected, _ = two.update(grads, two.init(part), part)
    chex.assert_trees_all_close(train, expected, rtol=1e-5)


def test_optimizer_needs_params(base, delta):
    tx = lora.optimizer(optax.sgd(0.1))
    tree = {"base": base, "delta": delta}
    with pytest.raises(ValueError, match="needs params"):
        tx.update(tree, tx.init(tree))


def test_optimizer_passes_extra_arguments(base, delta, lenient):
    tree = {"delta": delta}
    tx = lora.optimizer(optax.contrib.reduce_on_plateau())
    _, state = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree, value=jnp.float32(1.0))
    assert state is not None
