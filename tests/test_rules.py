"""How single operations treat an adapted weight, and that "factored" means it: no dense array, forward or backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import lora_jax as lora
from tests.contract.jaxpr_checks import dense_dependents, equations


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


W, V, X = normal(0, 9, 7), normal(1, 9, 7), normal(2, 5, 9)


def moved(delta):
    """Away from the start, where one factor is zero."""

    def move(leaf):
        trains = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0
        return leaf + 0.2 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype) if trains else leaf

    return jax.tree.map(move, delta)


def check(fn, base, spec, *args):
    """Values and gradients are the merged model's; returns what explain says, the loss and the gradient as jaxprs."""
    delta = moved(lora.init(jax.random.key(0), base, spec, fn, *args))
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(fn)
    ours = lambda train: jnp.sum(jnp.sin(adapted(base, lora.join(train, frozen), *args)))  # noqa: E731
    merged = lambda train: jnp.sum(jnp.sin(fn(lora.merge(base, lora.join(train, frozen)), *args)))  # noqa: E731
    for one, other in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(ours))(train)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(merged))(train)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4 * (1 + float(jnp.abs(other).max())))
    forward, gradient = jax.make_jaxpr(ours)(train), jax.make_jaxpr(jax.grad(ours))(train)
    return lora.explain(fn, base, delta, *args), forward, gradient


BASE = {"w": W, "v": V, "s": jnp.float32(1.3)}
SPEC = {"w": lora.LoRA(2, axes=("in", "out")), "v": lora.LoRA(2, axes=("in", "out")), "s": lora.Full()}
DENSE = {63, 42}
"""The sizes of a weight and of the slice of one that a function reads. No activation or factor has such a size."""

FACTORED = {
    "product": lambda p, x: x @ p["w"],
    "transposed": lambda p, x: (p["w"].T @ x.T).T,
    "constant": lambda p, x: x @ (0.5 * p["w"]),
    "negated": lambda p, x: x @ -p["w"],
    "trained scalar": lambda p, x: x @ (p["w"] * p["s"]),
    "computed from a trained scalar": lambda p, x: x @ (p["w"] * jnp.exp(p["s"])),
    "divided by a trained scalar": lambda p, x: x @ (p["w"] / p["s"]),
    "divided by a norm": lambda p, x: x @ (p["w"] / jnp.linalg.norm(x @ p["v"])),
    "scaled by an activation": lambda p, x: x @ (p["w"] * jnp.tanh(x @ p["v"]).mean()),
    "two uses": lambda p, x: x @ p["w"] + jnp.tanh(x @ p["w"]) * p["s"],
    "a slice": lambda p, x: x[:, :6] @ p["w"][:6],
    "the whole and another term": lambda p, x: x @ (p["w"] + p["v"]),
    "a row": lambda p, x: x @ p["v"] + p["w"][2][None],
    "looked up": lambda p, x: x @ p["v"] + p["w"][jnp.arange(5)] * p["s"],
    "in a call": lambda p, x: jax.jit(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
    "rematerialized": lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p["w"], x),
    "in a branch": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda w, x: x @ w, lambda w, x: jnp.tanh(x @ -w), p["w"], x),
    "in a loop": lambda p, x: jax.lax.scan(lambda c, row: (c, row @ (c[0] * c[1])), (p["w"], p["s"]), x)[1],
}
MERGED = {
    "divided by its own norm": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])),
    "divided by the norms of its columns": lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
    "a slice divided by its own norm": lambda p, x: x[:, :6] @ (p["w"][:6] / jnp.linalg.norm(p["w"][:6])),
    "a slice and another term": lambda p, x: x[:, :6] @ (p["w"][:6] + p["v"][:6]),
    "a slice and a constant": lambda p, x: x[:, :6] @ (p["w"][:6] + 1.0),
    "masked": lambda p, x: x @ (p["w"] * (jnp.arange(63.0).reshape(9, 7) > 2).astype(jnp.float32)),
}
"""Functions that have no factored form."""


@pytest.mark.parametrize("idiom", [*FACTORED, *MERGED])
def test_factored_means_that_no_dense_array_depends_on_what_trains(idiom):
    fn = {**FACTORED, **MERGED}[idiom]
    used = [name for name in BASE if reads(fn, name)]
    explained, forward, gradient = check(
        fn, {name: BASE[name] for name in used}, {name: SPEC[name] for name in used}, X
    )
    uses = [use for name in "wv" for use in explained.get(name, ())]
    assert all(use.factored for use in uses) == (idiom in FACTORED), str(explained)
    assert bool(dense_dependents(forward, DENSE)) == bool(dense_dependents(gradient, DENSE)) == (idiom in MERGED)


def reads(fn, name):
    """Whether a function reads a leaf of BASE."""
    jaxpr = jax.make_jaxpr(lambda leaf: fn({**BASE, name: leaf}, X))(BASE[name]).jaxpr
    return any(variable is jaxpr.invars[0] for equation in jaxpr.eqns for variable in equation.invars)


TRAIN = {"a": normal(3, 2, 9), "b": normal(4, 2, 7), "s": jnp.float32(2)}


@pytest.mark.parametrize(
    ("primitive", "form"),
    {
        "add": lambda train: W + train["s"],
        "mul": lambda train: W * train["s"],
        "neg": lambda train: -(W + train["a"].T @ train["b"]),
        "dot_general": lambda train: train["a"].T @ train["b"],
        "transpose": lambda train: (train["b"].T @ train["a"]).T,
        "reshape": lambda train: (jnp.arange(63.0)[:, None] @ train["s"][None, None]).reshape(9, 7),
        "slice": lambda train: (jnp.arange(70.0).reshape(10, 7) * train["s"])[:9],
    }.items(),
)
def test_a_dense_array_is_noticed_whatever_forms_it(primitive, form):
    dense = dense_dependents(jax.make_jaxpr(lambda train: X @ form(train))(TRAIN), DENSE)
    assert any(line.startswith(primitive) for line in dense), dense


def with_own_jvp(fn):
    fn = jax.custom_jvp(fn)
    fn.defjvp(lambda primals, tangents: (fn(*primals), fn(*tangents)))
    return fn


def with_own_vjp(fn):
    fn = jax.custom_vjp(fn)
    fn.defvjp(lambda w: (fn(w), w), lambda w, out: (w * out.sum(),))
    return fn


BODIES = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_own_jvp,
    "custom_vjp": with_own_vjp,
    "cond": lambda fn: lambda w: jax.lax.cond(X[0, 0] > 0, fn, lambda w: X[:, :7], w),
    "scan": lambda fn: lambda w: jax.lax.scan(lambda out, _: (out + fn(w), None), X[:, :7], length=2)[0],
    "while": lambda fn: lambda w: jax.lax.while_loop(lambda out: out.sum() < 9, lambda out: out + fn(w), X[:, :7]),
}


@pytest.mark.parametrize("body", BODIES)
def test_dependence_is_followed_into_and_out_of_bodies(body):
    fn = BODIES[body](lambda w: X @ jnp.sin(w))
    used = jax.make_jaxpr(lambda train: fn(W + train["s"]))(TRAIN)
    assert "sin -> (9, 7)" in dense_dependents(used, DENSE)
    returned = jax.make_jaxpr(lambda train: fn(W + train["s"]).sum() * V)(TRAIN)
    assert "mul -> (9, 7)" in dense_dependents(returned, DENSE)
    assert dense_dependents(jax.make_jaxpr(lambda train: fn(W) * train["s"])(TRAIN), DENSE) == []


def test_what_a_loop_carries_becomes_dependent_in_a_later_round():
    def fn(train):
        step = lambda carry, _: ((-carry[1], carry[1] * carry[2], train["s"]), None)  # noqa: E731
        return jax.lax.scan(step, (W, V, jnp.float32(0)), length=3)[0][0]

    assert "neg -> (9, 7)" in dense_dependents(jax.make_jaxpr(fn)(TRAIN), DENSE)


def test_a_trained_scalar_multiplies_an_adapted_weight():
    explained, *_ = check(
        FACTORED["trained scalar"], {"w": W, "s": jnp.float32(1.3)}, {"w": lora.LoRA(2), "s": lora.Full()}, X
    )
    assert [use.factored for use in explained["w"]] == [True]


def test_products_of_looked_up_embeddings_are_factored():
    base, ids = {"e": normal(0, 20, 8), "k": normal(1, 3, 8, 7), "r": normal(2, 2, 8, 7)}, jnp.arange(18).reshape(3, 6)

    def convolution(p, ids):
        return jax.lax.conv_general_dilated(p["e"][ids], p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    def grouped(p, ids):
        return jax.lax.ragged_dot(p["e"][ids[0]], p["r"], jnp.array([2, 4], jnp.int32))

    for fn, name in ((convolution, "k"), (grouped, "r")):
        explained, *_ = check(fn, {"e": base["e"], name: base[name]}, {"": lora.LoRA(2)}, ids)
        assert explained.factored, str(explained)


def test_a_branch_for_another_platform_is_not_compiled():
    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    def fn(p, x):
        shape = jax.ShapeDtypeStruct((x.shape[0], p["w"].shape[1]), x.dtype)
        return jax.lax.platform_dependent(
            x, p["w"], tpu=lambda x, w: pl.pallas_call(kernel, out_shape=shape)(x, w), default=lambda x, w: x @ w
        )

    base, x = {"w": normal(0, 16, 8)}, normal(1, 4, 16)
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, init="orthogonal")}, fn, x)
    adapted = lora.adapt(fn)
    want = x @ lora.merge(base, delta)["w"]
    np.testing.assert_allclose(adapted(base, delta, x), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(adapted)(base, delta, x), want, rtol=1e-4, atol=1e-5)
    names = {equation.primitive.name for equation in equations(jax.make_jaxpr(adapted)(base, delta, x))}
    assert "platform_index" in names and "pallas_call" in names
    uses = lora.explain(fn, base, delta, x)["w"]
    assert {(use.operation, use.factored) for use in uses} == {("pallas_call", False), ("dot_general", True)}


def test_a_scan_keeps_its_parameters():
    def fn(p, x):
        step = lambda x, w: (jnp.tanh(x @ w), x)  # noqa: E731
        return jax.lax.scan(step, x, p["w"], reverse=True, unroll=2, _split_transpose=True)[0]

    base, x = {"w": normal(0, 4, 8, 8)}, normal(1, 2, 8)
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2)}, fn, x)

    def parameters(program):
        (scan,) = [equation for equation in equations(program) if equation.primitive.name == "scan"]
        return {name: scan.params.get(name) for name in ("reverse", "unroll", "length", "_split_transpose")}

    assert parameters(jax.make_jaxpr(lora.adapt(fn))(base, delta, x)) == parameters(jax.make_jaxpr(fn)(base, x))


COMPLEX = {"w": jax.lax.complex(normal(0, 9, 7), normal(1, 9, 7))}


@pytest.mark.parametrize(
    "recipe",
    [lora.LoRA(2), lora.DoRA(2), lora.VeRA(2), lora.LoHa(2), lora.LoKr(2), lora.IA3(), lora.AdaLoRA(2)],
    ids=lambda recipe: type(recipe).__name__,
)
def test_real_factors_for_a_complex_weight_are_refused(recipe):
    with pytest.raises(ValueError, match=rf"'w': {type(recipe).__name__} has factors of dtype float32.*complex64"):
        lora.init(jax.random.key(0), COMPLEX, {"w": recipe}, lambda p, x: x @ p["w"], X.astype(jnp.complex64))


def test_a_complex_weight_is_trained_in_full():
    x, fn = X.astype(jnp.complex64), lambda p, x: x @ p["w"]
    delta = lora.init(jax.random.key(0), COMPLEX, {"w": lora.Full()}, fn, x)
    np.testing.assert_allclose(lora.adapt(fn)(COMPLEX, delta, x), fn(COMPLEX, x), rtol=1e-4, atol=1e-4)
    delta = {"w": dataclasses.replace(delta["w"], value=delta["w"].value * jnp.complex64(1 + 2j))}
    merged = fn(lora.merge(COMPLEX, delta), x)
    np.testing.assert_allclose(lora.adapt(fn)(COMPLEX, delta, x), merged, rtol=1e-4, atol=1e-4)
