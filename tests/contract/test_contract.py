"""The contract: what holds for every layer, recipe, dtype and transformation.

By default every pair of values of every two factors occurs in some case; `pytest tests/contract
--full-product` runs all combinations.
"""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import cases
from contract.jaxpr_checks import constants, weight_gradients

import lora_jax as lora

CHECKS = {}


def check(function):
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def test_contract(layer, recipe, dtype, transformation, tmp_path):
    case = cases.build(layer, recipe, dtype)
    CHECKS[transformation](case, tmp_path)


def close(case, actual, expected):
    """Equal dtypes, and values within the case's tolerance relative to the largest one."""

    def compare(a, b):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=case.tolerance * max(1e-3, np.abs(b).max()))

    jax.tree.map(compare, actual, expected)


def score(out):
    """A scalar that depends on every element of the output in a way of its own."""
    flat = out.astype(jnp.float32).reshape(-1)
    return jnp.sum(flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32)))


def losses(case):
    """The loss as a function of the trainable leaves: adapted, and through the merged weights."""
    train, frozen = lora.partition(case.delta)
    adapted = lora.adapt(case.fn)
    return (
        train,
        lambda train: score(adapted(case.base, lora.join(train, frozen), *case.args)),
        lambda train: score(case.fn(lora.merge(case.base, lora.join(train, frozen)), *case.args)),
    )


def stacked(case):
    """Two deltas as one, and the outputs of both."""
    deltas = [case.delta, cases.moved(case.fresh, 3)]
    outputs = [case.fn(lora.merge(case.base, delta), *case.args) for delta in deltas]
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    return jax.tree.map(stack, *deltas), jnp.stack(outputs)


@check
def check_plain(case, tmp_path):
    adapted = lora.adapt(case.fn)
    start = adapted(case.base, case.fresh, *case.args)
    plain = case.fn(case.base, *case.args)
    # Step 0, op by op: bit for bit.
    np.testing.assert_array_equal(np.asarray(start), np.asarray(plain))
    close(case, adapted(case.base, case.delta, *case.args), case.fn(lora.merge(case.base, case.delta), *case.args))
    np.testing.assert_array_equal(np.asarray(adapted(case.base, {}, *case.args)), np.asarray(plain))
    explained = lora.explain(case.fn, case.base, case.delta, *case.args)
    assert explained.factored == case.factored, str(explained)
    for path, axes in case.axes.items():
        assert case.fresh[path].axes in ((), axes)


@check
def check_jit(case, tmp_path):
    traces = []

    def counted(*args, **kwargs):
        traces.append(args)
        return case.fn(*args, **kwargs)

    adapted = lora.adapt(counted)
    # Called without jit first: the trace is the same one.
    adapted(case.base, case.delta, *case.args)
    compiled = jax.jit(lambda delta, args: adapted(case.base, delta, *args))
    for delta in (case.delta, cases.moved(case.fresh, 3)):
        out = compiled(delta, case.args)
        close(case, out, case.fn(lora.merge(case.base, delta), *case.args))
    assert len(traces) == 1 and compiled._cache_size() == 1
    start = compiled(case.fresh, case.args).astype(jnp.float32)
    plain = case.fn(case.base, *case.args)
    plain_dtype, plain = plain.dtype, plain.astype(jnp.float32)
    bound = 1e-6 if plain_dtype == jnp.float32 else 1e-2
    assert float(jnp.abs(start - plain).max()) <= bound * max(1.0, float(jnp.abs(plain).max()))
    arrays, rest = eqx.partition(case.base, eqx.is_array)
    jaxpr = jax.make_jaxpr(lambda arrays, delta, args: adapted(eqx.combine(arrays, rest), delta, *args))(
        arrays, case.delta, case.args
    )
    assert constants(jaxpr) == []


@check
def check_grad(case, tmp_path):
    train, adapted, merged = losses(case)
    close(case, jax.grad(adapted)(train), jax.grad(merged)(train))
    if case.factored:
        known = [(cases.weight(case.base, path).shape, case.axes[path]) for path in case.delta]
        assert weight_gradients(jax.make_jaxpr(jax.grad(adapted))(train), known) == []
        if case.layer not in cases.USES_DEVICES:  # whose gradients have the shape of a shard
            assert weight_gradients(jax.make_jaxpr(jax.grad(merged))(train), known) != []


@check
def check_jvp(case, tmp_path):
    train, adapted, merged = losses(case)
    tangent = jax.tree.map(lambda leaf: jnp.cos(leaf), train)
    if case.forward_mode:
        close(case, jax.jvp(adapted, (train,), (tangent,)), jax.jvp(merged, (train,), (tangent,)))
    else:
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(adapted, (train,), (tangent,))


@check
def check_vmap(case, tmp_path):
    both, expected = stacked(case)
    adapted = lora.adapt(case.fn)
    close(case, jax.vmap(lambda delta: adapted(case.base, delta, *case.args))(both), expected)


@check
def check_scan(case, tmp_path):
    both, expected = stacked(case)
    adapted = lora.adapt(case.fn)
    body = lambda carry, delta: (carry + 1, adapted(case.base, delta, *case.args))  # noqa: E731
    close(case, jax.lax.scan(body, 0, both)[1], expected)


@check
def check_remat(case, tmp_path):
    train, adapted, merged = losses(case)
    close(case, jax.jit(jax.grad(jax.checkpoint(adapted)))(train), jax.grad(merged)(train))


@check
def check_pmap(case, tmp_path):
    both, expected = stacked(case)
    adapted = lora.adapt(case.fn)
    mapped = jax.pmap(lambda delta: adapted(case.base, delta, *case.args), devices=jax.devices()[:2])
    close(case, mapped(both), expected)


@check
def check_shard_map(case, tmp_path):
    both, expected = stacked(case)
    adapted = lora.adapt(case.fn)
    mesh = jax.make_mesh((2,), ("member",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    member = jax.sharding.PartitionSpec("member")

    def one(both):
        delta = jax.tree.map(lambda leaf: leaf[0], both)
        return adapted(case.base, delta, *case.args)[None]

    close(case, jax.jit(jax.shard_map(one, mesh=mesh, in_specs=member, out_specs=member))(both), expected)


@check
def check_train(case, tmp_path):
    adapted = lora.adapt(case.fn)
    tx = optax.sgd(0.1)
    arrays, rest = eqx.partition(case.base, eqx.is_array)
    state = lora.TrainState.create(arrays, case.delta, tx, jax.random.key(5))
    step = lora.train_step(lambda base, delta, batch, key: score(adapted(eqx.combine(base, rest), delta, *batch)), tx)
    base, delta = jax.tree.map(np.array, (arrays, case.delta))
    after, metrics = step(state, case.args)
    assert set(metrics["nonfinite"]) == set(case.delta)
    chex.assert_trees_all_equal(jax.tree.map(np.array, after.base), base)
    (train, frozen), (new_train, new_frozen) = lora.partition(delta), lora.partition(after.delta)
    chex.assert_trees_all_equal(jax.tree.map(np.array, new_frozen), frozen)
    for old, new in zip(jax.tree.leaves(train), jax.tree.leaves(new_train)):
        assert (np.asarray(new) != old).any()


@check
def check_save(case, tmp_path):
    lora.save(tmp_path / "adapter", case.delta, base=case.base)
    loaded = lora.load(tmp_path / "adapter", case.base)
    chex.assert_trees_all_equal(loaded, case.delta)
    assert jax.tree.structure(loaded) == jax.tree.structure(case.delta)
    adapted = lora.adapt(case.fn)
    np.testing.assert_array_equal(
        np.asarray(adapted(case.base, loaded, *case.args)), np.asarray(adapted(case.base, case.delta, *case.args))
    )
