"""Traced programs are kept: how often a function is traced, and what makes it traced again."""

import functools
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

GLOBAL = 1.0


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (4, 6))}


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (2, 4))


@pytest.fixture
def delta(base, x, getkey):
    delta = lora.init(getkey(), base, {"w": lora.LoRA(2)}, lambda base, x: x @ base["w"], x)
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim else leaf, delta)


class Counted:
    """A model that counts how often it is traced."""

    def __init__(self):
        self.traces = []

    def __call__(self, base, x, scale=1.0):
        self.traces.append(None)
        return x @ base["w"] * scale

    def apply(self, base, x, scale=1.0):
        return self(base, x, scale)


def test_a_second_call_traces_nothing(base, delta, x):
    model = Counted()
    adapted = lora.adapt(model)
    for _ in range(3):
        out = adapted(base, delta, x)
    assert len(model.traces) == 1
    chex.assert_trees_all_close(out, x @ lora.merge(base, delta)["w"], rtol=1e-5, atol=1e-5)
    adapted(base, jax.tree.map(lambda leaf: leaf * 2, delta), x + 1)
    jax.jit(adapted)(base, delta, x)
    lora.adapt(model)(base, delta, x)
    assert len(model.traces) == 1
    adapted(base, delta, jnp.ones((3, 4)))
    assert len(model.traces) == 2


def test_a_method_of_one_object_is_traced_once_and_of_another_again(base, delta, x):
    one, other = Counted(), Counted()
    for _ in range(2):
        lora.adapt(one.apply)(base, delta, x)
        lora.adapt(other.apply)(base, delta, x)
    assert len(one.traces) == len(other.traces) == 1


def test_derivatives_and_maps_outside_of_jit_trace_once(base, delta, x):
    model = Counted()
    adapted = lora.adapt(model)
    train, frozen = lora.partition(delta)

    def loss(train):
        return jnp.sum(adapted(base, lora.join(train, frozen), x) ** 2)

    gradients = [jax.grad(loss)(train) for _ in range(2)]
    assert len(model.traces) == 1
    chex.assert_trees_all_close(gradients[1], jax.jit(jax.grad(loss))(train), rtol=1e-5, atol=1e-5)
    stacked = lora.stack([delta, delta])
    out = [jax.vmap(adapted, in_axes=(None, 0, None))(base, stacked, x) for _ in range(2)][1]
    chex.assert_trees_all_close(out[0], adapted(base, delta, x), rtol=1e-5, atol=1e-5)
    assert len(model.traces) == 1


@pytest.mark.parametrize("closed_over", [False, True], ids=["argument", "closure"])
def test_numbers_that_change_from_call_to_call_are_not_compiled_each_time(closed_over, base, delta, x):
    adapted, compiled, factor = lora.adapt(Counted()), [], 1.0

    if closed_over:
        by_closure = lora.adapt(lambda base, x: x @ base["w"] * factor)

        def adapted(base, delta, x, number):
            nonlocal factor
            factor = number
            return by_closure(base, delta, x)

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    adapted(base, delta, x, 0.5)
    adapted(base, delta, x, 1.5)  # the operations one by one
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for number in range(2, 20):
            out = adapted(base, delta, x, number + 0.5)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert not compiled
    chex.assert_trees_all_close(out, 19.5 * x @ lora.merge(base, delta)["w"], rtol=1e-5, atol=1e-4)


def test_a_closure_variable_that_is_bound_anew_is_noticed(base, delta, x):
    scale = 1.0
    adapted = lora.adapt(lambda base, x: x @ base["w"] * scale)
    one = adapted(base, delta, x)
    scale = 2.0
    chex.assert_trees_all_close(adapted(base, delta, x), 2 * one, rtol=1e-6)
    scale = jnp.float32(3.0)
    chex.assert_trees_all_close(adapted(base, delta, x), 3 * one, rtol=1e-6)


def test_a_global_that_is_bound_anew_is_noticed(base, delta, x, monkeypatch):
    adapted = lora.adapt(functools.partial(lambda factor, base, x: x @ base["w"] * factor * GLOBAL, 1.0))
    one = adapted(base, delta, x)
    monkeypatch.setitem(globals(), "GLOBAL", 2.0)
    chex.assert_trees_all_close(adapted(base, delta, x), 2 * one, rtol=1e-6)


def test_a_function_that_binds_its_own_variables_is_traced_once(base, delta, x):
    traces = 0

    def fn(base, x):
        nonlocal traces
        traces += 1
        return x @ base["w"]

    adapted = lora.adapt(fn)
    for _ in range(3):
        adapted(base, delta, x)
    assert traces == 1


def test_programs_are_let_go_with_their_function_and_its_variables(base, delta, x):
    def references():
        scale = jnp.ones((1, 6)) * 3
        fn = lambda base, x: x @ base["w"] * scale  # noqa: E731
        lora.adapt(fn)(base, delta, x)
        return weakref.ref(fn), weakref.ref(scale)

    held = references()
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_the_arguments_of_a_call_are_not_kept(base, delta, x):
    adapted = lora.adapt(Counted())

    def references(base, delta, x):
        adapted(base, delta, x)
        with jax.checking_leaks():
            jax.grad(lambda x: adapted(base, delta, x).sum())(x)
        return [weakref.ref(leaf) for leaf in jax.tree.leaves((base, delta, x))]

    held = references(*jax.tree.map(jnp.array, (base, delta, x)))
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)


def test_an_object_that_holds_its_function_is_let_go(base, delta, x):
    class Owner:
        def __init__(self):
            self.fn = lambda base, x: x @ base["w"] * self.factor()

        def factor(self):
            return 2.0

    owner = Owner()
    lora.adapt(owner.fn)(base, delta, x)
    held = weakref.ref(owner)
    del owner
    gc.collect()
    assert held() is None


def test_arrays_on_different_devices(base, delta, x):
    """A model that moves its activations between devices by hand cannot be one program."""
    first, second = jax.devices()[:2]
    two = {"w": jax.device_put(base["w"], first), "v": jax.device_put(np.ones((6, 2), np.float32), second)}

    def fn(base, x):
        return jax.device_put(x @ base["w"], second) @ base["v"]

    adapted = lora.adapt(fn)
    for _ in range(3):
        out = adapted(two, delta, jax.device_put(x, first))
    assert out.devices() == {second}
    chex.assert_trees_all_close(np.asarray(out[:, 0]), np.asarray(x @ lora.merge(base, delta)["w"]).sum(-1), atol=1e-4)


def test_signed_zeros_are_different_arguments_and_nan_is_one(base, delta, x):
    model = Counted()
    adapted = lora.adapt(lambda base, x, sign: jnp.copysign(model(base, x), sign))
    for sign in (0.0, -0.0, 0.0, -0.0):
        assert np.all(np.signbit(adapted(base, delta, x, sign)) == np.signbit(sign))
    assert len(model.traces) == 2
    for _ in range(2):
        adapted(base, delta, x, float("nan"))
    assert len(model.traces) == 3
