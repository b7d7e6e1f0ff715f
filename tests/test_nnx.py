"""nnx.functional(): modules as functions of a plain dict."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

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
    deterministic, _ = apply_fn(base, x, mutable="batch_stats")
    assert (deterministic != 0).all()
    # Under jit the key is an argument like any other: two keys, two masks.
    compiled = jax.jit(lambda key: apply_fn(base, x, mutable="batch_stats", rngs=key)[0])
    assert (compiled(jax.random.key(3)) != compiled(jax.random.key(4))).any()


def test_adapted_with_dropout_and_batch_statistics(x):
    apply_fn, base = lora.nnx.functional(Model())
    options = {"mutable": ("batch_stats",), "rngs": jax.random.key(5)}
    delta = lora.init(jax.random.key(0), base, {r"layers/.*kernel": lora.LoRA(2)}, apply_fn, x, **options)
    out, changed = lora.adapt(apply_fn)(base, delta, x, **options)
    expected, expected_changed = apply_fn(base, x, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-5)  # one compiled program rounds otherwise than single operations
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), changed, expected_changed)


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


def test_merged_weights_go_back_by_nnx_update_and_by_updated(x):
    model = Model()
    model.eval()
    apply_fn, base = lora.nnx.functional(model)
    delta = lora.init(jax.random.key(0), base, {r"layers/.*kernel": lora.LoRA(2)}, apply_fn, x)
    delta = {path: dataclasses.replace(node, b=node.b + 0.3) for path, node in delta.items()}
    merged, expected = lora.merge(base, delta), lora.adapt(apply_fn)(base, delta, x)
    new = lora.nnx.updated(model, merged)
    np.testing.assert_allclose(new(x), expected, rtol=1e-4, atol=1e-5)
    assert (model(x) != expected).any(), "updated() changes no module"
    by_text = lora.nnx.nested({path: leaf * 2 for path, leaf in lora.nnx.paths.flatten(merged).as_dict().items()})
    np.testing.assert_array_equal(lora.nnx.updated(model, by_text).layers[1].kernel[...], 2 * new.layers[1].kernel[...])
    nnx.update(model, merged)
    np.testing.assert_array_equal(model(x), new(x))


def test_bases_with_text_keys_are_taken(x):
    model = Model()
    model.eval()
    apply_fn, base = lora.nnx.functional(model)
    by_text = lora.nnx.nested(lora.nnx.paths.flatten(base).as_dict())
    assert set(by_text["layers"]) == {"0", "1"}
    np.testing.assert_array_equal(apply_fn(by_text, x), apply_fn(base, x))


def test_updated_refuses_what_does_not_fit(x):
    _, base = lora.nnx.functional(Model())
    for target in (Model(), base):
        with pytest.raises(ValueError, match=r"no variable 'layers/2/kernel'; nearest: 'layers/"):
            lora.nnx.updated(target, {"layers": {2: {"kernel": jnp.ones((4, 4))}}})
        with pytest.raises(ValueError, match=r"'layers/1/bias': expected the shape \(4,\), got \(3,\)"):
            lora.nnx.updated(target, {"layers": {1: {"bias": jnp.ones(3)}}})
    with pytest.raises(TypeError, match=r"lora\.nnx\.updated: expected .* got the class Model"):
        lora.nnx.updated(Model, base)


class Asking(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        assert rngs is None or isinstance(rngs, nnx.Rngs)
        return self.dropout(self.linear(x), rngs=rngs)


def test_a_call_that_needs_rngs_is_given_none(x):
    apply_fn, base = lora.nnx.functional(Asking())
    for options in ({}, {"rngs": None}):
        assert (apply_fn(base, x, **options) != 0).all()
    assert (apply_fn(base, x, rngs=jax.random.key(1)) == 0).any()
    with pytest.raises(TypeError, match=r"rngs: expected a PRNG key, such as jax\.random\.key\(0\); got Rngs"):
        apply_fn(base, x, rngs=nnx.Rngs(0))
    delta = lora.init(jax.random.key(0), base, {"kernel": lora.LoRA(2)}, apply_fn, x)
    np.testing.assert_array_equal(lora.adapt(apply_fn)(base, delta, x), apply_fn(base, x))


class Refined(nnx.Module):
    """With a variable that holds a tree, a dict of modules and nested lists."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tree = nnx.Param({"a": jnp.ones(4), "b": {"c": jnp.zeros(4)}})
        self.blocks = nnx.List([nnx.List([nnx.Linear(4, 4, rngs=rngs)]), nnx.Dict(up=nnx.Linear(4, 4, rngs=rngs))])

    def __call__(self, x):
        return self.blocks[1].up(self.blocks[0][0](x)) * self.tree["a"][None] + self.tree["b"]["c"][None]


def test_trees_in_variables_and_nested_lists(x):
    model = Refined()
    apply_fn, base = lora.nnx.functional(model)
    assert set(base["blocks"]) == {0, 1} and set(base["blocks"][0][0]) == {"kernel", "bias"}
    np.testing.assert_array_equal(apply_fn(base, x), model(x))
    doubled = jax.tree.map(lambda leaf: leaf * 2, base)
    np.testing.assert_array_equal(lora.nnx.updated(model, doubled)(x), apply_fn(doubled, x))


def plain(params, x):
    return x @ params["w"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (linen.Dense(3), r"a Linen module \(Dense\)\. Instead, .*lora\.adapt\(model\.apply\)"),
        (Model, r"the class Model\. Instead, create a module first: Model\(…\)"),
        (plain, r"the function plain.*lora\.adapt\(fn\)"),
        ({"w": 1}, "dict"),
    ],
)
def test_what_is_no_module(model, message):
    with pytest.raises(TypeError, match=message):
        lora.nnx.functional(model)
