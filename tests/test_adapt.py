"""adapt(): what may be passed, what comes back, and what is refused."""

import concurrent.futures
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.transform import jaxprs


def matmul(base, x):
    return x @ base["w"]


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (4, 6)), "unused": jnp.ones(3)}


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (2, 3, 4))


@pytest.fixture
def delta(base, x, getkey):
    start = lora.init(getkey(), base, {"^w$": lora.LoRA(2, alpha=4)}, matmul, x)
    return {"w": dataclasses.replace(start["w"], b=jax.random.normal(getkey(), (2, 6)))}


def merged(base, delta):
    return lora.merge(base, delta)["w"]


def test_keyword_static_string_and_callable_arguments(base, delta, x):
    def fn(base, x, scale, *, mode, act, options):
        return act(x @ base["w"]) * scale if mode == "scaled" and options["on"] else x

    adapted = lora.adapt(fn)
    kwargs = {"mode": "scaled", "act": jnp.tanh, "options": {"on": True}}
    expected = jnp.tanh(x @ merged(base, delta)) * 2.0
    chex.assert_trees_all_close(adapted(base, delta, x, 2.0, **kwargs), expected, rtol=1e-5)
    # Another static value is another trace, not the cached one.
    chex.assert_trees_all_close(adapted(base, delta, x, 3.0, **kwargs), expected * 1.5, rtol=1e-5)


def test_adapters_of_other_ranks_swap_without_a_retrace(base, delta, x, getkey):
    traces = []

    def fn(base, x):
        traces.append(x)
        return x @ base["w"]

    run = jax.jit(lora.adapt(fn))
    other = lora.init(getkey(), base, {"^w$": lora.LoRA(1, alpha=7, init="gaussian")}, matmul, x)["w"]
    other = dataclasses.replace(other, b=jax.random.normal(getkey(), (1, 6))).pad_rank(2)
    for swapped in (delta, {"w": other}):
        chex.assert_trees_all_close(run(base, swapped, x), x @ merged(base, swapped), rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_one_and_true_and_one_point_zero_are_different_static_arguments(base, delta, x):
    adapted = lora.adapt(lambda base, x, flag: (x @ base["w"], flag))
    assert [type(adapted(base, delta, x, flag)[1]) for flag in (1, True, 1.0)] == [int, bool, float]


def test_outputs_that_are_no_arrays_pass_through(base, delta, x):
    out = lora.adapt(lambda base, x: {"y": x @ base["w"], "name": "y", "n": 3, "none": None})(base, delta, x)
    assert (out["name"], out["n"], out["none"]) == ("y", 3, None)
    chex.assert_trees_all_close(out["y"], x @ merged(base, delta), rtol=1e-5, atol=1e-5)


def test_unhashable_static_arguments(base, delta, x):
    class Unhashable:
        __hash__ = None

    out = lora.adapt(lambda base, x, thing: x @ base["w"])(base, delta, x, Unhashable())
    chex.assert_trees_all_close(out, x @ merged(base, delta), rtol=1e-5, atol=1e-5)


def test_numpy_arguments_are_traced(base, delta, x):
    traces = []

    def fn(base, x):
        traces.append(None)
        return x @ base["w"]

    adapted = lora.adapt(fn)
    for scale in (1.0, 2.0):
        chex.assert_trees_all_close(
            adapted(base, delta, np.asarray(x) * np.float32(scale)), scale * x @ merged(base, delta), atol=1e-5
        )
    assert len(traces) == 1


def test_closed_over_tracers_are_not_cached(base, delta, x):
    holder = {}
    adapted = lora.adapt(lambda base, x: (x @ base["w"]) * holder["scale"])

    def loss(scale):
        holder["scale"] = scale
        return adapted(base, delta, x).sum()

    slope = (x @ merged(base, delta)).sum()
    for scale in (1.0, 2.0):
        chex.assert_trees_all_close(jax.grad(loss)(scale), slope, rtol=1e-4)


def test_returned_weights_are_merged(base, delta, x):
    out = lora.adapt(lambda base, x: (base, x @ base["w"]))(base, delta, x)
    chex.assert_trees_all_close(out[0]["w"], merged(base, delta), rtol=1e-6)


def test_gradient_of_the_input(base, delta, x):
    adapted = lora.adapt(matmul)
    ours = jax.grad(lambda x: jnp.sin(adapted(base, delta, x)).sum())(x)
    chex.assert_trees_all_close(ours, jax.grad(lambda x: jnp.sin(x @ merged(base, delta)).sum())(x), atol=1e-5)


def test_the_name_stack_survives(base, delta, x):
    def fn(base, x):
        with jax.named_scope("attention"):
            return x @ base["w"]

    text = jax.jit(lora.adapt(fn)).lower(base, delta, x).as_text(debug_info=True)
    # `add` is the sum of both products: what is emitted carries the scope too.
    assert "attention/dot_general" in text and "attention/add" in text


def test_work_on_another_compute_type_stays_there(base, delta, x):
    def on_host(base, x):
        product = jaxprs.compute_on(
            lambda w, x: x @ w, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device
        )
        return jax.jit(product)(base["w"], x)

    assert lora.explain(on_host, base, delta, x).factored
    text = jax.jit(lora.adapt(on_host)).lower(base, delta, x).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 3 and all("_xla_compute_type" in line for line in dots)


def test_jit_is_re_emitted(base, delta, x):
    def fn(base, x):
        return jax.jit(lambda w, x: x @ w, inline=False)(base["w"], x)

    jaxpr = jax.make_jaxpr(lora.adapt(fn))(base, delta, x)
    assert [equation.primitive.name for equation in jaxpr.jaxpr.eqns].count("jit") == 1


def test_flatten_joins_token_axes(base, delta, x):
    def widths(flatten):
        jaxpr = jax.make_jaxpr(lora.adapt(matmul, flatten=flatten))(base, delta, x)
        return [e.outvars[0].aval.shape for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]

    assert (6, 2) in widths(True) and (2, 3, 2) in widths(False)


def test_a_wrong_base_is_refused(base, delta, x):
    with pytest.raises(ValueError, match=r"'w'.*\(4, 6\).*\(4, 5\)"):
        lora.adapt(matmul)({"w": jnp.ones((4, 5))}, delta, x)
    with pytest.raises(ValueError, match=r"'w', which is not in the base; nearest: 'ww'"):
        lora.adapt(matmul)({"ww": jnp.ones((4, 6))}, delta, x)


def test_an_unused_adapter_is_refused(base, x, getkey):
    delta = lora.init(getkey(), base, {"unused": lora.Full()})
    with pytest.raises(ValueError, match="'unused', which the function never uses"):
        lora.adapt(matmul)(base, delta, x)


def test_half_a_delta_is_refused(base, delta, x):
    with pytest.raises(ValueError, match=r"join\(train, frozen\)"):
        lora.adapt(matmul)(base, lora.partition(delta)[0], x)


def test_something_else_than_a_delta_is_refused(base, x):
    with pytest.raises(TypeError, match="dict from paths to adapters"):
        lora.adapt(matmul)(base, [1], x)
    with pytest.raises(TypeError, match="expected an Adapter"):
        lora.adapt(matmul)(base, {"w": jnp.ones((4, 6))}, x)


def test_dropout_needs_a_key_and_acts_on_the_low_rank_path_only(base, x, getkey):
    delta = lora.init(getkey(), base, {"^w$": lora.LoRA(2, dropout=0.5)}, matmul, x)
    adapted = lora.adapt(matmul)
    key = getkey()
    # b = 0: the base's path has no dropout.
    np.testing.assert_array_equal(adapted(base, delta, x, dropout_key=key), matmul(base, x))
    delta = {"w": dataclasses.replace(delta["w"], b=jnp.ones((2, 6)))}
    without = adapted(base, delta, x)
    dropped = adapted(base, delta, x, dropout_key=key)
    assert (without != dropped).any()
    np.testing.assert_array_equal(dropped, adapted(base, delta, x, dropout_key=key))
    mean = jnp.mean(
        jax.vmap(lambda k: adapted(base, delta, x, dropout_key=k))(jax.random.split(getkey(), 4000)), axis=0
    )
    chex.assert_trees_all_close(mean, without, atol=0.15)


def test_dropout_masks_differ_between_layers_and_steps_of_a_scan(getkey):
    x = jnp.ones((2, 64))
    base = {"w": jnp.zeros((3, 64, 4))}

    def fn(base, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), None, base["w"])[1]

    delta = lora.init(getkey(), base, {"w": lora.LoRA(1, dropout=0.5)}, fn, x)
    delta = {"w": dataclasses.replace(delta["w"], a=jnp.ones((3, 1, 64)), b=jnp.ones((3, 1, 4)))}
    out = lora.adapt(fn)(base, delta, x, dropout_key=getkey())
    assert len({float(v) for v in out[:, :, 0].reshape(-1)}) > 3

    shared = {"w": jnp.zeros((64, 4))}

    def loop(base, x):
        return jax.lax.scan(lambda c, _: (c, x @ base["w"]), None, None, length=3)[1]

    delta = lora.init(getkey(), shared, {"w": lora.LoRA(1, dropout=0.5)}, loop, x)
    delta = {"w": dataclasses.replace(delta["w"], a=jnp.ones((1, 64)), b=jnp.ones((1, 4)))}
    out = lora.adapt(loop)(shared, delta, x, dropout_key=getkey())
    assert len({float(v) for v in out[:, 0, 0]}) > 1


def test_explicit_mesh(getkey):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    rows, whole = PartitionSpec("data", None, None), PartitionSpec()
    with jax.set_mesh(mesh):

        def put(array, *spec):
            return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))

        base = {
            "table": put(jax.random.normal(getkey(), (8, 16))),
            "up": put(jax.random.normal(getkey(), (16, 32)), None, "model"),
            "down": put(jax.random.normal(getkey(), (32, 16)), "model", None),
            "fsdp": put(jax.random.normal(getkey(), (16, 16)), "data", None),
        }
        ids = put(jnp.arange(24).reshape(4, 6) % 8, "data", None)

        def fn(base, ids):
            x = base["table"].at[ids].get(out_sharding=rows)
            h = jnp.tanh(x @ base["up"])
            h = jnp.einsum("btf,fd->btd", h, base["down"], out_sharding=rows)
            return h @ jax.reshard(base["fsdp"], whole)

        delta = lora.init(getkey(), base, {".": lora.LoRA(2, alpha=4)}, fn, ids)
        delta = {path: dataclasses.replace(node, a=node.a + 0.1, b=node.b + 0.1) for path, node in delta.items()}
        changed = lora.merge(base, delta)
        assert {path: w.sharding for path, w in changed.items()} == {path: w.sharding for path, w in base.items()}
        for flatten in (True, False):
            out = jax.jit(lora.adapt(fn, flatten=flatten))(base, delta, ids)
            assert jax.typeof(out).sharding == jax.typeof(fn(base, ids)).sharding
            chex.assert_trees_all_close(out, fn(changed, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flatten", [True, False])
def test_flattening_gathers_a_sharded_sequence_and_not_flattening_does_not(flatten, getkey):
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    base = {"w": jax.random.normal(getkey(), (32, 48))}
    x = jax.device_put(jnp.ones((4, 64, 32)), NamedSharding(mesh, PartitionSpec(None, "sequence")))
    delta = lora.init(getkey(), base, {"w": lora.LoRA(2)}, matmul, x)
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(matmul, flatten=flatten)

    def loss(train):
        y = adapted(base, lora.join(train, frozen), x)
        y = jax.lax.with_sharding_constraint(y, NamedSharding(mesh, PartitionSpec(None, "sequence")))
        return jnp.sum(y**2)

    text = jax.jit(jax.grad(loss)).lower(train).compile().as_text()
    sizes = [line for line in text.splitlines() if "all-gather(" in line and ("4,64" in line or "256," in line)]
    assert bool(sizes) == flatten


@pytest.mark.parametrize("fill", [0.0, 1.0, None])
def test_lookups_out_of_range_are_filled_once(fill, getkey):
    base, ids = {"t": jax.random.normal(getkey(), (5, 4))}, jnp.asarray([1, 9])
    fn = lambda base, ids: jnp.take(base["t"], ids, axis=0, mode="fill", fill_value=fill)  # noqa: E731
    delta = lora.init(getkey(), base, {"t": lora.LoRA(2)}, fn, ids)
    delta = {"t": dataclasses.replace(delta["t"], a=delta["t"].a + 0.5)}
    chex.assert_trees_all_close(lora.adapt(fn)(base, delta, ids), fn(lora.merge(base, delta), ids), rtol=1e-5)


def test_a_function_with_an_argument_of_adapted_is_refused():
    with pytest.raises(ValueError, match="dropout_key"):
        lora.adapt(lambda base, x, *, dropout_key=None: x)


def test_a_named_weight_stays_factored():
    """`checkpoint_name` marks a value for remat policies; the weight goes through it."""
    base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))

    def fn(base, x):
        return x @ checkpoint_name(base["w"], "weight")

    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, init="gaussian")}, fn, x)
    assert lora.explain(fn, base, delta, x).factored


def test_threads_draw_the_same_dropout(getkey):
    """Each trace counts the uses of a dropout key by itself, whatever other threads trace meanwhile."""
    base = {"w": jax.random.normal(getkey(), (8, 8))}
    x = jax.random.normal(getkey(), (4, 8))
    fn = lambda base, x: jnp.tanh(x @ base["w"]) @ base["w"]  # noqa: E731
    delta = lora.init(getkey(), base, {"w": lora.LoRA(2, init="gaussian", dropout=0.5)}, fn, x)
    delta["w"] = dataclasses.replace(delta["w"], b=jnp.ones_like(delta["w"].b))
    key = getkey()
    expected = lora.adapt(fn)(base, delta, x, dropout_key=key)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(lora.adapt(fn), base, delta, x, dropout_key=key) for _ in range(16)]
    for run in runs:
        np.testing.assert_array_equal(run.result(), expected)
