"""The contract: what holds for every layer, recipe, dtype and transformation.

By default every pair of values of every two factors occurs in some case; `pytest tests/contract
--full-product` runs all combinations.
"""

import dataclasses

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from contract import cases
from contract.jaxpr_checks import CONTRACTIONS, constants, equations, weight_gradients
from lora_jax.quantization.codebooks import dynamic_map

CHECKS = {}


def check(function):
    CHECKS[function.__name__.removeprefix("check_")] = function
    return function


def test_contract(layer, recipe, dtype, transformation):
    # JAX's own dot_product_attention, which NNX uses, does not run on bfloat16 under strict promotion.
    with jax.numpy_dtype_promotion("standard" if layer == "nnx.MultiHeadAttention" else "strict"):
        CHECKS[transformation](cases.build(layer, recipe, dtype))


def close(case, actual, merged):
    """What the adapted form gave agrees with what the merged form gives.

    Args:
      case: The case.
      actual: From the adapted form, in the case's dtype.
      merged: `merged(case)` is the same through merged weights. A bfloat16 case is held against float32: within the
        tolerance, or where a value nearly cancels, within a few times what bfloat16 costs the merged form itself.
    """
    exact = merged(case.wide or case)
    error = worst(actual, exact)
    if case.wide is None:
        assert [x.dtype for x in jax.tree.leaves(actual)] == [x.dtype for x in jax.tree.leaves(exact)]
    if error > case.tolerance and case.wide is not None:
        assert error <= 3 * worst(merged(case), exact)
    else:
        assert error <= case.tolerance


def worst(actual, exact):
    """The largest error of any array, relative to its largest value."""

    def error(a, b):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        assert a.shape == b.shape and np.isfinite(a).all()
        return np.abs(a - b).max(initial=0) / max(1e-3, np.abs(b).max(initial=0))

    return max(jax.tree.leaves(jax.tree.map(error, actual, exact)))


def equal(actual, expected, *, exactly):
    """Bit for bit, or to 1e-6 (in bfloat16: one rounding) of the largest value."""
    assert actual.dtype == expected.dtype
    bound = 0.0 if exactly else 1e-6 if actual.dtype == jnp.float32 else 2**-8
    a, b = (np.asarray(x.astype(jnp.float32)) for x in (actual, expected))
    np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1.0, np.abs(b).max()))


def score(out):
    """A scalar that depends on every element of the output in a way of its own."""
    flat = out.astype(jnp.float32).reshape(-1)
    return jnp.sum(flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32)))


def merged_output(case):
    """The output through merged weights; compiled as one, which is quicker than op by op."""
    return jax.jit(lambda delta: case.merged(delta))(case.delta)


def merged_outputs(case):
    """Of both moved deltas, stacked."""
    run = jax.jit(lambda delta: case.merged(delta))
    return jnp.stack([run(case.delta), run(case.other)])


def merged_gradient(case):
    return jax.jit(jax.grad(merged_loss(case)))(lora.partition(case.delta)[0])


def merged_loss(case):
    """The loss as a function of the trainable leaves, through the merged weights."""
    frozen = lora.partition(case.delta)[1]
    return lambda train: score(case.merged(lora.join(train, frozen)))


def adapted_loss(case):
    """The trainable leaves, and the loss as a function of them."""
    train, frozen = lora.partition(case.delta)
    adapted = lora.adapt(case.fn)
    return train, lambda train: score(adapted(case.base, lora.join(train, frozen), *case.args))


def stacked(case):
    """Two deltas as one."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), case.delta, case.other)


def has_compiled_parts(case):
    """Whether contractions stand in parts that JAX compiles even outside jit."""
    jaxpr = jax.make_jaxpr(lambda args: case.fn(case.plain, *args))(case.args)
    top = sum(equation.primitive.name in CONTRACTIONS for equation in jaxpr.jaxpr.eqns)
    return top != sum(equation.primitive.name in CONTRACTIONS for equation in equations(jaxpr))


@check
def check_plain(case):
    adapted = lora.adapt(case.fn)
    start = adapted(case.base, case.fresh, *case.args)
    plain = case.fn(case.plain, *case.args)
    # Step 0: to rounding, because XLA may fuse a compiled program differently; bit for bit op by op.
    equal(start, plain, exactly=False)
    equal(adapted(case.base, {}, *case.args), plain, exactly=False)
    if not has_compiled_parts(case):
        with jax.disable_jit():
            equal(adapted(case.base, case.fresh, *case.args), case.fn(case.plain, *case.args), exactly=True)
    close(case, adapted(case.base, case.delta, *case.args), merged_output)
    explained = lora.explain(case.fn, case.base, case.delta, *case.args)
    assert explained.factored == case.factored, str(explained)
    for path, axes in case.axes.items():
        assert case.fresh[path].axes in ((), axes)


@check
def check_jit(case):
    traces = []

    def counted(*args, **kwargs):
        traces.append(args)
        return case.fn(*args, **kwargs)

    adapted = lora.adapt(counted)
    # Called without jit first: the trace is the same one.
    adapted(case.base, case.delta, *case.args)
    compiled = jax.jit(lambda delta, args: adapted(case.base, delta, *args))
    close(case, jnp.stack([compiled(delta, case.args) for delta in (case.delta, case.other)]), merged_outputs)
    # One program, or none: JAX drops the oldest when all functions of a process together have too many.
    assert len(traces) == 1 and compiled._cache_size() <= 1
    equal(compiled(case.fresh, case.args), jax.jit(lambda args: case.fn(case.plain, *args))(case.args), exactly=False)
    arrays, rest = eqx.partition(case.base, eqx.is_array)
    jaxpr = jax.make_jaxpr(lambda arrays, delta, args: adapted(eqx.combine(arrays, rest), delta, *args))(
        arrays, case.delta, case.args
    )
    table = dynamic_map()  # of quantized scales
    assert [const for const in constants(jaxpr) if not np.array_equal(const, table)] == []


@check
def check_grad(case):
    train, adapted = adapted_loss(case)
    close(case, jax.jit(jax.grad(adapted))(train), merged_gradient)
    if case.factored:
        weights = [(cases.weight(case.base, path).shape, case.axes[path]) for path in case.delta]
        assert weight_gradients(jax.make_jaxpr(jax.grad(adapted))(train), weights) == []
        if not case.in_parts:
            assert weight_gradients(jax.make_jaxpr(jax.grad(merged_loss(case)))(train), weights) != []


@check
def check_jvp(case):
    train, frozen = lora.partition(case.delta)
    tangent = jax.tree.map(jnp.cos, train)
    adapted = lora.adapt(case.fn)

    def forward(function):
        return jax.jit(lambda train: jax.jvp(function, (train,), (tangent,)))(train)

    def ours(train):
        return adapted(case.base, lora.join(train, frozen), *case.args)

    def merged(case):
        def out(train):
            return case.merged(lora.join(train, lora.partition(case.delta)[1]))

        moved = lora.partition(case.delta)[0]
        return jax.jit(lambda train: jax.jvp(out, (train,), (jax.tree.map(jnp.cos, train),)))(moved)

    if case.forward_mode:
        close(case, forward(ours), merged)
    else:
        with pytest.raises(TypeError, match="forward-mode"):
            forward(ours)


@check
def check_vmap(case):
    both = stacked(case)
    adapted = lora.adapt(case.fn)
    close(case, jax.jit(jax.vmap(lambda delta: adapted(case.base, delta, *case.args)))(both), merged_outputs)


@check
def check_scan(case):
    both = stacked(case)
    adapted = lora.adapt(case.fn)
    body = lambda carry, delta: (carry + 1, adapted(case.base, delta, *case.args))  # noqa: E731
    close(case, jax.lax.scan(body, 0, both)[1], merged_outputs)


@check
def check_remat(case):
    train, adapted = adapted_loss(case)
    close(case, jax.jit(jax.grad(jax.checkpoint(adapted)))(train), merged_gradient)


@check
def check_pmap(case):
    both = stacked(case)
    adapted = lora.adapt(case.fn)
    mapped = jax.pmap(lambda delta: adapted(case.base, delta, *case.args), devices=jax.devices()[:2])
    close(case, mapped(both), merged_outputs)


@check
def check_shard_map(case):
    both = stacked(case)
    adapted = lora.adapt(case.fn)
    mesh = jax.make_mesh((2,), ("member",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    member = jax.sharding.PartitionSpec("member")

    def one(both):
        delta = jax.tree.map(lambda leaf: leaf[0], both)
        return adapted(case.base, delta, *case.args)[None]

    close(case, jax.jit(jax.shard_map(one, mesh=mesh, in_specs=member, out_specs=member))(both), merged_outputs)


BY_RECIPE = [
    (layer, recipe)
    for recipe in cases.RECIPES
    for layer in (("linen.vmap",) if recipe in cases.NONLINEAR else ("linen.scan", "nnx.Embed"))
    if cases.fits(layer, recipe)
]


@pytest.mark.parametrize("layer, recipe", BY_RECIPE)
def test_training_moves_the_trainable_leaves_only(layer, recipe):
    case = cases.build(layer, recipe, "float32")
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


@pytest.mark.parametrize("layer, recipe", BY_RECIPE)
def test_a_saved_adapter_is_the_same(layer, recipe, tmp_path):
    case = cases.build(layer, recipe, "float32")
    lora.save(tmp_path / "adapter", case.delta, base=case.base)
    loaded = lora.load(tmp_path / "adapter", case.base)
    chex.assert_trees_all_equal(loaded, case.delta)
    assert jax.tree.structure(loaded) == jax.tree.structure(case.delta)
    chex.assert_trees_all_equal(merged_output(dataclasses.replace(case, delta=loaded)), merged_output(case))


@pytest.mark.parametrize("layer", ["raw.x_w", "raw.x_wT", "linen.scan", "linen.Conv2d_strided", "raw.ragged_dot"])
def test_a_merge_only_stand_in_fails_the_check_for_weight_gradients(layer):
    case = cases.build(layer, "LoRA", "float32")
    train, adapted = adapted_loss(case)
    weights = [(cases.weight(case.base, path).shape, case.axes[path]) for path in case.delta]
    assert weight_gradients(jax.make_jaxpr(jax.grad(adapted))(train), weights) == []
    assert weight_gradients(jax.make_jaxpr(jax.grad(merged_loss(case)))(train), weights) != []
