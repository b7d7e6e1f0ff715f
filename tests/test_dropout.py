"""Dropout masks depend on the key, the path and the index of the use, not on the transforms around a layer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import lora_jax as lora


def layer(w, x):
    return jnp.tanh(x @ w)


jitted = jax.jit(layer)


def unrolled(step, count=3):
    def fn(base, x):
        for _ in range(count):
            x = step(base["w"], x)
        return x

    return fn


def nested_jit(base, x):
    twice = jax.jit(lambda w, x: jitted(w, jitted(w, x)))
    return jitted(base["w"], twice(base["w"], x))


def scan(base, x):
    return jax.lax.scan(lambda x, _: (layer(base["w"], x), None), x, None, length=3)[0]


def part_of_scan(base, x):
    x, _ = jax.lax.scan(lambda x, _: (jax.checkpoint(layer)(base["w"], x), None), x, None, length=2)
    return layer(base["w"], x)


def nested_scan(base, x):
    """One layer, then one run of an outer scan with two runs of an inner one."""

    def outer(x, _):
        return jax.lax.scan(lambda x, _: (layer(base["w"], x), None), x, None, length=2)[0], None

    return jax.lax.scan(outer, layer(base["w"], x), None, length=1)[0]


def fori_loop(base, x):
    return jax.lax.fori_loop(0, 3, lambda _, x: layer(base["w"], x), x)


def while_loop(base, x):
    def step(state):
        number, x = state
        return number + 1, layer(base["w"], x)

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]


def in_shard_map(base, x):
    mesh, whole = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec()
    mapped = jax.shard_map(
        lambda w, x: layer(w, layer(w, x)), mesh=mesh, in_specs=(whole, whole), out_specs=whole, check_vma=False
    )
    return layer(base["w"], mapped(base["w"], x))


def in_cond(base, x):
    return jax.lax.cond(jnp.sum(x) > 1e6, lambda w, x: x, lambda w, x: layer(w, layer(w, layer(w, x))), base["w"], x)


PLAIN = unrolled(layer)

SAME = {
    "checkpoint": unrolled(jax.checkpoint(layer)),
    "jit": unrolled(jitted),
    "jit of checkpoint": unrolled(jax.jit(jax.checkpoint(layer))),
    "nested jit": nested_jit,
    "one jit": jax.jit(PLAIN),
    "scan": scan,
    "scan and a layer": part_of_scan,
    "scan of scan": nested_scan,
    "fori_loop": fori_loop,
    "while_loop": while_loop,
    "shard_map": in_shard_map,
    "cond": in_cond,
}


@pytest.fixture
def problem(getkey):
    base, x = {"w": jax.random.normal(getkey(), (6, 6))}, jax.random.normal(getkey(), (4, 6))
    delta = lora.init(getkey(), base, {"w": lora.LoRA(3, alpha=6, dropout=0.5)}, PLAIN, x)
    return base, jax.tree.map(lambda leaf: leaf * 0.3 + 0.1 if leaf.ndim > 1 else leaf, delta), x


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_mask_does_not_depend_on_what_is_around_a_layer(name, compiled, problem, getkey):
    base, delta, x = problem
    key = getkey()
    adapted = lora.adapt(SAME[name])
    out = (jax.jit(adapted) if compiled else adapted)(base, delta, x, dropout_key=key)
    chex.assert_trees_all_close(out, lora.adapt(PLAIN)(base, delta, x, dropout_key=key), rtol=1e-4, atol=1e-5)
    assert (out != adapted(base, delta, x)).any()


@pytest.mark.parametrize("name", [name for name in SAME if name not in ("while_loop", "shard_map")])
def test_the_backward_pass_uses_the_masks_of_the_forward_pass(name, problem, getkey):
    base, delta, x = problem
    key = getkey()
    train, frozen = lora.partition(delta)

    def gradient(fn):
        def loss(train):
            return jnp.sum(lora.adapt(fn)(base, lora.join(train, frozen), x, dropout_key=key) ** 2)

        return jax.grad(loss)(train)

    chex.assert_trees_all_close(gradient(SAME[name]), gradient(PLAIN), rtol=1e-3, atol=1e-4)


def masks(fn, base, delta, x, key):
    """The terms that the adapters add, of which each shows its mask."""
    return np.asarray(lora.adapt(fn)(base, delta, x, dropout_key=key) - fn(base, x))


def all_differ(rows):
    return len({row.tobytes() for row in rows}) == len(rows)


def show(w, x):
    return x @ w


SHOWN = jax.jit(show)


@pytest.mark.parametrize(
    "fn",
    [
        lambda base, x: jnp.stack([show(base["w"], x) for _ in range(4)]),
        lambda base, x: jnp.stack([SHOWN(base["w"], x) for _ in range(4)]),
        lambda base, x: jax.lax.scan(lambda c, _: (c, show(base["w"], x)), None, None, length=4)[1],
        lambda base, x: jax.lax.map(lambda _: jax.checkpoint(show)(base["w"], x), jnp.arange(4)),
        lambda base, x: jnp.stack([jax.lax.map(lambda _: show(base["w"], x), jnp.arange(2)) for _ in range(2)]),
    ],
    ids=["unrolled", "calls of one jit", "scan", "checkpoint in a scan", "two scans"],
)
def test_every_use_has_a_mask_of_its_own(fn, getkey):
    base, x = {"w": jnp.zeros((64, 3))}, jnp.ones((2, 64))
    delta = lora.init(getkey(), base, {"w": lora.LoRA(1, dropout=0.5)}, fn, x)
    delta = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim > 1 else leaf, delta)
    assert all_differ(masks(fn, base, delta, x, getkey()).reshape(4, -1))


def test_uses_after_a_while_loop_have_masks_of_their_own(getkey):
    base, x = {"w": jnp.zeros((64, 3))}, jnp.ones((2, 64))

    def fn(base, x):
        def step(state):
            number, out = state
            return number + 1, out.at[number].set(x @ base["w"])

        loops = []
        for _ in range(2):
            loops.append(jax.lax.while_loop(lambda state: state[0] < 3, step, (0, jnp.zeros((3, 2, 3))))[1])
        return jnp.concatenate([*loops, (x @ base["w"])[None]])

    delta = lora.init(getkey(), base, {"w": lora.LoRA(1, dropout=0.5)}, fn, x)
    delta = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim > 1 else leaf, delta)
    assert all_differ(masks(fn, base, delta, x, getkey()))


def test_a_scan_over_layers_has_the_masks_of_its_unrolled_form(getkey):
    base, x = {"w": jax.random.normal(getkey(), (3, 6, 6))}, jax.random.normal(getkey(), (4, 6))

    def over_layers(base, x):
        return jax.lax.scan(lambda x, w: (layer(w, x), None), x, base["w"])[0]

    def one_by_one(base, x):
        for index in range(3):
            x = jax.checkpoint(layer)(base["w"][index], x)
        return x

    delta = lora.init(getkey(), base, {"w": lora.LoRA(3, dropout=0.5)}, over_layers, x)
    delta = jax.tree.map(lambda leaf: leaf * 0.3 + 0.1 if leaf.ndim > 1 else leaf, delta)
    key = getkey()
    one, other = (lora.adapt(fn)(base, delta, x, dropout_key=key) for fn in (over_layers, one_by_one))
    chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_mask_does_not_depend_on_what_else_is_adapted(getkey):
    base, x = {name: jax.random.normal(getkey(), (6, 6)) for name in "ab"}, jax.random.normal(getkey(), (4, 6))

    def fn(base, x):
        return x @ base["a"], x @ base["b"], x @ base["a"]

    delta = lora.init(getkey(), base, {".": lora.LoRA(3, dropout=0.5)}, fn, x)
    delta = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim > 1 else leaf, delta)
    key = getkey()
    first, _, second = lora.adapt(fn)(base, delta, x, dropout_key=key)
    alone = lora.adapt(fn)(base, {"a": delta["a"]}, x, dropout_key=key)
    chex.assert_trees_all_close((first, second), (alone[0], alone[2]), rtol=1e-6)


def test_branches_number_their_own_uses(getkey):
    base, x = {"w": jnp.zeros((64, 3))}, jnp.ones((2, 64))

    def fn(base, x, index):
        branches = [lambda w, x: x @ w, lambda w, x: jax.checkpoint(show)(w, x)]
        return jax.lax.switch(index, branches, base["w"], x), x @ base["w"]

    delta = lora.init(getkey(), base, {"w": lora.LoRA(1, dropout=0.5)}, fn, x, 0)
    delta = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim > 1 else leaf, delta)
    key = getkey()
    adapted = lora.adapt(fn)
    one, other = (adapted(base, delta, x, jnp.int32(index), dropout_key=key) for index in (0, 1))
    chex.assert_trees_all_close(one, other, rtol=1e-6)
    assert (one[0] != one[1]).any()
