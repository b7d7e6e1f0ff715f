"""nnx.functional(): modules as functions of a plain dict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(self.norm(x)) * scale


@pytest.fixture
def x(getkey):
    return jax.random.normal(getkey(), (8, 4))


def test_paths_and_values():
    model = Model()
    _, base = lora.nnx.functional(model)
    assert set(lora.nnx.paths.flatten(base).paths) == {
        "layers/0/kernel",
        "layers/0/bias",
        "layers/1/kernel",
        "layers/1/bias",
        "norm/scale",
        "norm/bias",
        "norm/mean",
        "norm/var",
    }
    np.testing.assert_array_equal(base["layers"][0]["kernel"], model.layers[0].kernel[...])


def test_evaluation_equals_the_module(x):
    model = Model()
    model.eval()
    apply_fn, base = lora.nnx.functional(model)
    np.testing.assert_array_equal(apply_fn(base, x, scale=2.0), model(x, scale=2.0))


def test_changed_variables_are_refused_unless_named(x):
    apply_fn, base = lora.nnx.functional(Model())
    with pytest.raises(ValueError, match=r"'norm/mean' \(BatchStat\).*model\.eval\(\)"):
        apply_fn(base, x)
    for mutable in ("batch_stats", ("BatchStat",), (nnx.BatchStat,), ("norm/",)):
        out, changed = apply_fn(base, x, mutable=mutable)
        assert set(changed) == {"norm"} and set(changed["norm"]) == {"mean", "var"}
        assert out.shape == x.shape


def test_nothing_is_mutated(x):
    model = Model()
    apply_fn, base = lora.nnx.functional(model)
    before = jax.tree.map(np.array, base)
    first = apply_fn(base, x, mutable="batch_stats", rngs=jax.random.key(1))
    second = apply_fn(base, x, mutable="batch_stats", rngs=jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    np.testing.assert_array_equal(model.norm.mean[...], 0)
    assert int(model.dropout.rngs.count[...]) == 0


def test_dropout_needs_a_key_and_follows_it(x):
    apply_fn, base = lora.nnx.functional(Model())
    outs = [apply_fn(base, x, mutable="batch_stats", rngs=key)[0] for key in jax.random.split(jax.random.key(2), 2)]
    assert (outs[0] == 0).any() and (outs[0] != outs[1]).any()
    still, _ = apply_fn(base, x, mutable="batch_stats")
    assert (still != 0).all()
    # Under jit the key is an argument like any other: two keys, two masks.
    compiled = jax.jit(lambda key: apply_fn(base, x, mutable="batch_stats", rngs=key)[0])
    assert (compiled(jax.random.key(3)) != compiled(jax.random.key(4))).any()


def test_adapted_with_dropout_and_batch_statistics(x):
    apply_fn, base = lora.nnx.functional(Model())
    options = {"mutable": ("batch_stats",), "rngs": jax.random.key(5)}
    delta = lora.init(jax.random.key(0), base, {r"layers/.*kernel": lora.LoRA(2)}, apply_fn, x, **options)
    out, changed = lora.adapt(apply_fn)(base, delta, x, **options)
    expected, expected_changed = apply_fn(base, x, **options)
    np.testing.assert_array_equal(out, expected)
    jax.tree.map(np.testing.assert_array_equal, changed, expected_changed)


def test_a_base_that_does_not_fit(x):
    apply_fn, base = lora.nnx.functional(Model())
    with pytest.raises(ValueError, match=r"lacks 4 variables and has 0.*'norm/bias'"):
        apply_fn({"layers": base["layers"]}, x)
    with pytest.raises(ValueError, match=r"lacks 0 variables and has 1.*'extra'"):
        apply_fn(base | {"extra": x}, x)


class Lifted(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    @nnx.remat
    def block(self, x):
        return jnp.tanh(self.linear(x))

    def __call__(self, x, *, rngs=None):
        return self.dropout(self.block(x), rngs=rngs)


def test_lifted_transforms_inside_the_module(x):
    apply_fn, base = lora.nnx.functional(Lifted())
    delta = lora.init(jax.random.key(0), base, {"kernel": lora.LoRA(2)}, apply_fn, x)
    assert lora.explain(apply_fn, base, delta, x).factored
    np.testing.assert_allclose(jax.jit(lora.adapt(apply_fn))(base, delta, x), apply_fn(base, x), rtol=1e-6)


def test_a_key_reaches_a_call_that_takes_rngs(x):
    apply_fn, base = lora.nnx.functional(Lifted())
    assert (apply_fn(base, x) != 0).all()
    assert (apply_fn(base, x, rngs=jax.random.key(1)) == 0).any()
