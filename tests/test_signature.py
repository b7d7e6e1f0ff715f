"""The signature of adapted functions: static and donated arguments are those of the model."""

import functools
import inspect

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora


def model(params, x, train=False):
    return (x @ params["w"]) * (2 if train else 1)


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (8, 6))}


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (3, 8))


@pytest.fixture
def delta(base, x, getkey):
    delta = lora.init(getkey(), base, {"w": lora.LoRA(2)}, model, x)
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim else leaf, delta)


@pytest.fixture
def expected(base, delta, x):
    return 2 * x @ lora.merge(base, delta)["w"]


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"static_argnums": 3}, {"static_argnames": "train"}])
@pytest.mark.parametrize("by_name", [False, True])
def test_static_arguments(options, by_name, base, delta, x, expected):
    adapted = jax.jit(lora.adapt(model), **options)
    close(adapted(base, delta, x, train=True) if by_name else adapted(base, delta, x, True), expected)


@pytest.mark.parametrize("options", [{"donate_argnums": 2}, {"donate_argnames": "x"}])
def test_donated_arguments(options, base, delta, getkey):
    def fn(params, x):
        return x + x @ params["w"] @ params["w"].T

    x = jax.random.normal(getkey(), (3, 8))
    jax.jit(lora.adapt(fn), **options)(base, delta, x)
    assert x.is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves((base, delta)))


def test_equinox_filter_jit(base, delta, x, expected):
    adapted = eqx.filter_jit(lora.adapt(model))
    close(adapted(base, delta, x, train=True), expected)
    close(adapted(base, delta, x, True), expected)


def test_base_and_delta_by_name_and_by_partial(base, delta, x, expected):
    adapted = lora.adapt(model)
    close(adapted(base=base, delta=delta, x=x, train=True), expected)
    close(adapted(base, delta=delta, x=x, train=True), expected)
    close(functools.partial(adapted, base)(delta, x, train=True), expected)
    close(functools.partial(adapted, delta=delta, base=base)(x=x, train=True), expected)


class Module(eqx.Module):
    factor: int = 2

    def __call__(self, params, x, /, *, train=False):
        return (x @ params["w"]) * (self.factor if train else 1)

    def apply(self, params, x, train: bool = False):
        return self(params, x, train=train)


def keywords(params, x, *rest, train, **options):
    return (x @ params["w"]) * (2 if train else 1)


@pytest.mark.parametrize(
    ("fn", "signature"),
    [
        (model, "(base, delta, x, train=False, *, dropout_key=None)"),
        (jax.jit(model, static_argnames="train"), "(base, delta, x, train=False, *, dropout_key=None)"),
        (Module(), "(base, delta, x, /, *, train=False, dropout_key=None)"),
        (Module().apply, "(base, delta, x, train: bool = False, *, dropout_key=None)"),
        (functools.partial(model, train=True), "(base, delta, x, *, train=True, dropout_key=None)"),
        (keywords, "(base, delta, x, *rest, train, dropout_key=None, **options)"),
        (lambda params, /, x: x, "(base, delta, x, *, dropout_key=None)"),
        (lambda *args: args, "(base, delta, *args, dropout_key=None)"),
        (lambda params, base, x: x, "(base_, delta, /, base, x, *, dropout_key=None)"),
        (lambda params, x, *, delta: x, "(base, delta_, /, x, *, delta, dropout_key=None)"),
        (min, "(base, delta, *args, dropout_key=None, **kwargs)"),
    ],
    # names without addresses: every worker has to collect the same ones
    ids=["function", "jit", "module", "method", "partial", "keywords", *(f"names {i}" for i in range(4)), "builtin"],
)
def test_signatures(fn, signature):
    assert str(inspect.signature(lora.adapt(fn))) == signature


@pytest.mark.parametrize("fn", [Module(), Module().apply, functools.partial(model), keywords], ids=range(4))
def test_callables_of_every_kind(fn, base, delta, x, expected):
    close(lora.adapt(fn)(base, delta, x, train=True), expected)
    close(jax.jit(lora.adapt(fn), static_argnames="train")(base, delta, x, train=True), expected)


def test_a_model_whose_own_parameters_are_called_base_and_delta(base, delta, x, expected):
    def fn(params, base, delta, train=False):
        return model(params, base + delta, train)

    adapted = lora.adapt(fn)
    close(adapted(base, delta, x, 0.0, True), expected)
    close(adapted(base, delta, base=x, delta=0.0, train=True), expected)
    close(jax.jit(adapted, static_argnames=("train", "delta"))(base, delta, base=x, delta=0.0, train=True), expected)
    anything = lora.adapt(lambda params, x, **more: model(params, x, more["base"]))
    close(anything(base, delta, x, base=True), expected)


def test_missing_arguments_are_named(base, delta, x):
    adapted = lora.adapt(model)
    with pytest.raises(TypeError, match=r"model\(\): missing a required argument: 'delta'"):
        adapted(base)
    with pytest.raises(TypeError, match=r"model\(\) missing 1 required positional argument: 'x'"):
        adapted(base, delta)
    with pytest.raises(TypeError, match="unexpected keyword argument 'training'"):
        adapted(base, delta, x, training=True)
    with pytest.raises(TypeError, match=r"adapt takes a function .*; got dict"):
        lora.adapt(base)


def test_routed_functions(base, delta, x, expected):
    stacked, ids = lora.stack([delta, {}]), jnp.zeros(3, jnp.int32)

    def one(params, x, train=False, *, scale=1.0):
        return model(params, x, train) * scale

    routed = lora.route(lora.adapt(one))
    assert str(inspect.signature(routed)) == (
        "(base, stacked, adapter_ids, x, train=False, *, scale=1.0, dropout_key=None)"
    )
    close(routed(base, stacked, ids, x, True), expected)
    close(routed(base, stacked=stacked, adapter_ids=ids, x=x[0], train=True)[0], expected[0])
    for options in ({"static_argnums": 4}, {"static_argnames": "train"}):
        compiled = jax.jit(routed, **options)
        close(compiled(base, stacked, ids, x, True), expected)
        close(compiled(base, stacked, ids, x, train=True), expected)
    close(eqx.filter_jit(routed)(base, stacked, ids, x, True), expected)
    donated = x + 0
    jax.jit(lora.route(lora.adapt(lambda params, x: x @ params["w"] @ params["w"].T)), donate_argnames="x")(
        base, stacked, ids, donated
    )
    assert donated.is_deleted() and not any(leaf.is_deleted() for leaf in jax.tree.leaves((base, stacked, ids)))
