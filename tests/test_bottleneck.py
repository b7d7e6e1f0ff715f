"""Bottleneck adapters: what the contract suite does not say of them."""

import dataclasses
import json
import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.peft import LINEAR, Names, Weight

WIDTH, HIDDEN, HEADS = 8, 12, 2
X = jax.random.normal(jax.random.key(7), (2, 5, WIDTH))


def moved(delta, seed=9):
    """The delta after some training."""
    leaves, treedef = jax.tree.flatten(delta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys))


def bottleneck(y, node, activation=jax.nn.relu):
    """The formula, over the last axis."""
    z = y
    if node.norm_scale is not None:
        normal = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)
        z = jnp.einsum("...d,d->...d", normal, node.norm_scale)
        z = (z.reshape(-1, z.shape[-1]) + node.norm_bias[None]).reshape(y.shape)
    hidden = jnp.einsum("...d,rd->...r", z, node.down)
    hidden = activation(hidden + jnp.broadcast_to(node.down_bias, hidden.shape))
    return y + jnp.einsum("...r,rd->...d", hidden, node.up) + jnp.broadcast_to(node.up_bias, y.shape)


def score(out):
    return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, expected)


def dense(key, fan_in, fan_out):
    one, two = jax.random.split(key)
    return {
        "kernel": jax.random.normal(one, (fan_in, fan_out)) / fan_in**0.5,
        "bias": jax.random.normal(two, (fan_out,)),
    }


def layer_params(key):
    keys = jax.random.split(key, 6)
    sizes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    names = ("query", "key", "value", "output", "up", "down")
    return {name: dense(k, *sizes.get(name, (WIDTH, WIDTH))) for name, k in zip(names, keys)}


def normalized(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def encoder(params, x, adapters=None, activation=jax.nn.relu):
    """Transformer layers as in BERT; `adapters` are applied by hand, before dropout and residual would be."""

    def linear(path, x):
        weights = params
        for name in path.split("/"):
            weights = weights[name]
        y = x @ weights["kernel"] + jnp.broadcast_to(weights["bias"], (*x.shape[:-1], weights["bias"].size))
        node = (adapters or {}).get(f"{path}/kernel")
        return y if node is None else bottleneck(y, node, activation)

    for name in params:
        q, k, v = (
            linear(f"{name}/{part}", x).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        weights = jax.nn.softmax(q @ k.mT / q.shape[-1] ** 0.5, axis=-1)
        x = normalized(x + linear(f"{name}/output", (weights @ v).swapaxes(1, 2).reshape(x.shape)))
        x = normalized(x + linear(f"{name}/down", jax.nn.gelu(linear(f"{name}/up", x))))
    return x


PARAMS = {f"layer_{i}": layer_params(jax.random.key(i)) for i in range(2)}

PLACEMENTS = {
    "Houlsby": ({"(output|down)/kernel": lora.Bottleneck(4, "swish")}, jax.nn.silu, 4),
    "Pfeiffer": ({"down/kernel": lora.Bottleneck(4)}, jax.nn.relu, 2),
    "Lin": ({"down/kernel": lora.Bottleneck(4, norm=True)}, jax.nn.relu, 2),
    "AdapterDrop": ({"layer_[1-9].*(output|down)/kernel": lora.Bottleneck(4, "tanh")}, jnp.tanh, 2),
}


@pytest.mark.parametrize("spec, activation, count", PLACEMENTS.values(), ids=PLACEMENTS)
def test_values_and_gradients_are_those_of_layers_written_by_hand(spec, activation, count):
    fresh = lora.init(jax.random.key(0), PARAMS, spec, encoder, X)
    delta, adapted = moved(fresh), lora.adapt(encoder)
    assert len(delta) == count
    np.testing.assert_allclose(adapted(PARAMS, fresh, X), encoder(PARAMS, X), rtol=0, atol=1e-6)

    def by_hand(delta, x):
        return encoder(PARAMS, x, delta, activation)

    close(adapted(PARAMS, delta, X), by_hand(delta, X))
    gradients = jax.jit(jax.grad(lambda delta, x: score(adapted(PARAMS, delta, x)), (0, 1)))(delta, X)
    close(gradients, jax.jit(jax.grad(lambda delta, x: score(by_hand(delta, x)), (0, 1)))(delta, X))


def linen_model(bias):
    module = nn.Dense(WIDTH, use_bias=bias, bias_init=nn.initializers.normal())
    return lambda base, x: module.apply(base, x), module.init(jax.random.key(0), X)


def nnx_model(bias):
    model = nnx.Linear(WIDTH, WIDTH, use_bias=bias, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    return lora.nnx.functional(model)


def equinox_model(bias):
    model = eqx.nn.Linear(WIDTH, WIDTH, use_bias=bias, key=jax.random.key(0))
    return (lambda model, x: jax.vmap(jax.vmap(model))(x)), model


def haiku_model(bias):
    def call(x):
        return hk.Linear(WIDTH, with_bias=bias, b_init=hk.initializers.RandomNormal())(x)

    pure = hk.without_apply_rng(hk.transform(call))
    return pure.apply, pure.init(jax.random.key(0), X)


def plain_model(bias):
    base = dense(jax.random.key(0), WIDTH, WIDTH)
    if bias:
        return (lambda base, x: x @ base["kernel"] + base["bias"][None, None]), base
    return (lambda base, x: x @ base["kernel"]), base


MODELS = {
    "linen": linen_model,
    "nnx": nnx_model,
    "equinox": equinox_model,
    "haiku": haiku_model,
    "plain": plain_model,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_framework_s_layer_before_its_residual(make, bias):
    linear, base = make(bias)
    fn = lambda base, x: x + linear(base, x)  # noqa: E731
    delta = moved(lora.init(jax.random.key(0), base, {"kernel$|weight$|w$": lora.Bottleneck(3)}, fn, X))
    (node,) = delta.values()
    close(lora.adapt(fn)(base, delta, X), X + bottleneck(linear(base, X), node))
    (use,) = [use for uses in lora.explain(fn, base, delta, X).values() for use in uses]
    then = "then y + up(relu(down(y)))"
    assert use.factored and use.reason == (f"x·W + bias, {then}" if bias else f"x·W, {then}")


W, B = jax.random.normal(jax.random.key(1), (WIDTH, 6)), jax.random.normal(jax.random.key(2), (6,))
BASE = {"w": W, "b": B, "positions": jax.random.normal(jax.random.key(3), (5, 6)), "scalar": jnp.float32(2)}
DELTA = moved(lora.init(jax.random.key(0), BASE, {"^w$": lora.Bottleneck(3, axes=("in", "out"))}))
NODE = DELTA["w"]


def act(y):
    return bottleneck(y, NODE)


def split(y):
    return y.reshape(*y.shape[:-1], 2, 3)


def row(base):
    return base["b"][None, None]


FOLLOWING = {
    "bias": (lambda p, x: x @ p["w"] + row(p), lambda: act(X @ W + row(BASE)), True),
    "bias first": (lambda p, x: row(p) + x @ p["w"], lambda: act(X @ W + row(BASE)), True),
    "cast bias": (lambda p, x: x @ p["w"] + 2 * jnp.tanh(row(p)), lambda: act(X @ W + 2 * jnp.tanh(row(BASE))), True),
    "scalar": (lambda p, x: x @ p["w"] + p["scalar"], lambda: act(X @ W + 2), True),
    "second bias": (lambda p, x: x @ p["w"] + row(p) + row(p), lambda: act(X @ W + row(BASE)) + row(BASE), True),
    "constant": (lambda p, x: x @ p["w"] + 1.0, lambda: act(X @ W) + 1.0, False),
    "positions": (lambda p, x: x @ p["w"] + p["positions"][None], lambda: act(X @ W) + BASE["positions"][None], False),
    "gate": (lambda p, x: x @ p["w"] * row(p), lambda: act(X @ W) * row(BASE), False),
    "heads": (
        lambda p, x: split(x @ p["w"]) + split(row(p)),
        lambda: split(act(X @ W + row(BASE))),
        True,
    ),
    "heads, transposed": (
        lambda p, x: split(x @ p["w"]).transpose(0, 2, 1, 3) + split(row(p)).transpose(0, 2, 1, 3),
        lambda: split(act(X @ W + row(BASE))).transpose(0, 2, 1, 3),
        True,
    ),
    "cut across": (
        lambda p, x: (x @ p["w"]).reshape(2, 3, 10).sum(-1),
        lambda: act(X @ W).reshape(2, 3, 10).sum(-1),
        False,
    ),
    "einsum": (lambda p, x: jnp.einsum("bti,io->obt", x, p["w"]), lambda: jnp.moveaxis(act(X @ W), 2, 0), False),
    "einsum and bias": (
        lambda p, x: jnp.einsum("bti,io->obt", x, p["w"]) + p["b"][:, None, None],
        lambda: jnp.moveaxis(act(X @ W + row(BASE)), 2, 0),
        True,
    ),
    "remat": (
        lambda p, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w + row(p)))(p["w"], x),
        lambda: jnp.tanh(act(X @ W + row(BASE))),
        True,
    ),
    "two uses": (lambda p, x: (y := x @ p["w"]) * 2 + (y + row(p)), lambda: act(X @ W) * 3 + row(BASE), False),
    "twice": (
        lambda p, x: x @ p["w"] + row(p) + (2 * x) @ p["w"],
        lambda: act(X @ W + row(BASE)) + act(2 * X @ W),
        True,
    ),
    "returned in a scan": (
        lambda p, x: jax.lax.scan(lambda _, x: (None, x @ p["w"]), None, x)[1],
        lambda: act(X @ W),
        False,
    ),
    "cond": (
        lambda p, x: jax.lax.cond(x.sum() > 1e9, lambda w: x @ w, lambda w: x @ w + row(p), p["w"]),
        lambda: act(X @ W + row(BASE)),
        True,
    ),
}


@pytest.mark.parametrize("fn, expected, has_bias", FOLLOWING.values(), ids=FOLLOWING)
def test_a_bias_comes_first_and_nothing_else(fn, expected, has_bias):
    close(lora.adapt(fn)(BASE, DELTA, X), expected())
    close(jax.jit(lora.adapt(fn, flatten=False))(BASE, DELTA, X), expected())
    assert ("x·W + bias, then" in str(lora.explain(fn, BASE, DELTA, X))) == has_bias


def test_a_residual_of_one_token_is_no_bias():
    square, fn, x = {"w": W[:6]}, (lambda p, x: x @ p["w"] + x), jnp.ones(6)
    delta = moved(lora.init(jax.random.key(0), square, {"w": lora.Bottleneck(2)}, fn, x))
    close(lora.adapt(fn)(square, delta, x), bottleneck(x @ W[:6], delta["w"]) + x)


def test_an_adapted_bias_comes_first_too():
    delta = DELTA | moved(lora.init(jax.random.key(0), BASE, {"^b$": lora.IA3(axes=("out",))}))
    fn = lambda p, x: x @ p["w"] + row(p)  # noqa: E731
    close(lora.adapt(fn)(BASE, delta, X), act(X @ W + (B * delta["b"].gain)[None, None]))


LAYERS = {"w": jax.random.normal(jax.random.key(4), (3, WIDTH, WIDTH)) / 3, "b": jnp.linspace(-1, 1, 3 * WIDTH)}
LAYERS |= {"b": LAYERS["b"].reshape(3, WIDTH)}


def one_layer(w, b, x):
    return jnp.tanh(x @ w + b[None, None])


def stacked_here(p, x):
    w, b = (jnp.stack([p[f"{name}{i}"] for i in range(3)]) for name in ("w", "b"))
    return jax.lax.scan(lambda x, wb: (one_layer(*wb, x), None), x, (w, b))[0]


def while_loop(p, x):
    def body(state):
        i, x = state
        return i + 1, one_layer(p["w"][i], p["b"][i], x)

    return jax.lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


LOOPS = {
    "scan": lambda p, x: jax.lax.scan(lambda x, wb: (one_layer(*wb, x), None), x, (p["w"], p["b"]))[0],
    "unrolled": lambda p, x: one_layer(
        p["w"][2], p["b"][2], one_layer(p["w"][1], p["b"][1], one_layer(p["w"][0], p["b"][0], x))
    ),
    "fori_loop": lambda p, x: jax.lax.fori_loop(0, 3, lambda i, x: one_layer(p["w"][i], p["b"][i], x), x),
    "while_loop": while_loop,
}


def layers_by_hand(nodes):
    x = X
    for i in range(3):
        x = jnp.tanh(bottleneck(x @ LAYERS["w"][i] + LAYERS["b"][i][None, None], nodes[i]))
    return x


@pytest.mark.parametrize("fn", LOOPS.values(), ids=LOOPS)
def test_each_layer_of_a_loop_has_its_own(fn):
    recipe = lora.Bottleneck(3, norm=True, axes=("batch", "in", "out"))
    delta = moved(lora.init(jax.random.key(0), LAYERS, {"w": recipe}, fn, X))
    nodes = [jax.tree.map(lambda leaf, i=i: leaf[i], delta["w"]) for i in range(3)]
    close(lora.adapt(fn)(LAYERS, delta, X), layers_by_hand(nodes))
    assert "x·W + bias, then y + up(relu(down(norm(y))))" in str(lora.explain(fn, LAYERS, delta, X))


def test_layers_that_the_function_stacks_have_their_own():
    base = {f"{name}{i}": LAYERS[name][i] for name in ("w", "b") for i in range(3)}
    delta = moved(lora.init(jax.random.key(0), base, {"w": lora.Bottleneck(3)}, stacked_here, X))
    nodes = [delta[f"w{i}"] for i in range(3)]
    close(lora.adapt(stacked_here)(base, delta, X), layers_by_hand(nodes))
    fewer = {"w0": delta["w0"]}
    with pytest.raises(ValueError, match="'w0': the weight would be merged here: it is joined with other arrays"):
        lora.adapt(stacked_here)(base, fewer, X)


def in_shards(p, x):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rows = PartitionSpec("model")
    product = lambda x, w: jax.lax.psum(x @ w, "model")  # noqa: E731
    return jax.shard_map(
        product, mesh=mesh, in_specs=(PartitionSpec(None, None, "model"), rows), out_specs=PartitionSpec()
    )(x, p["w"])


@jax.custom_jvp
def opaque(x, w):
    return x @ w


opaque.defjvp(lambda primals, tangents: (opaque(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))

REFUSED = {
    "tied": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, "sums over other elements than the 8 inputs of the layer"),
    "sliced outputs": (lambda p, x: x @ p["w"][:, :3], "has a part of the 6 outputs of the layer"),
    "sliced inputs": (lambda p, x: x[..., :4] @ p["w"][:4], "sums over other elements than the 8 inputs"),
    "lookup": (lambda p, x: p["w"][jnp.argmax(x, -1)] ** 2, "its rows are looked up"),
    "sin": (lambda p, x: x @ jnp.sin(p["w"]), "there is no factored form of sin"),
    "returned": (lambda p, x: (x @ p["w"], p["w"]), "the function returns it"),
    "concatenated": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1), "it is joined with other arrays"),
    "sum of two": (lambda p, x: x @ (p["w"] + p["w"]), "it is joined with other weights"),
    "selected": (lambda p, x: x @ jnp.where(p["scalar"] > 0, p["w"], 0.0), "a part of it is selected"),
    "replaced": (lambda p, x: x @ p["w"].at[:, 2:].set(p["w"][:, 2:]), "a part of"),
    "padded": (lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 2))), "it is joined with other arrays"),
    "product": (lambda p, x: x @ (p["w"] @ jnp.ones((6, 6))), "an array multiplies it"),
    "custom_jvp": (lambda p, x: opaque(x, p["w"]), "its derivative is declared for the weight as a whole"),
    "shard_map": (in_shards, "sums over other elements than the 8 inputs"),
    "ragged_dot": (
        lambda p, x: jax.lax.ragged_dot(x[0], p["w"][None], jnp.asarray([5])),
        "each row of the input chooses a matrix",
    ),
}


@pytest.mark.parametrize("fn, message", REFUSED.values(), ids=REFUSED)
def test_other_uses_are_errors_that_name_them(fn, message):
    with pytest.raises(ValueError, match=r"^'w': the weight would be merged here: ") as error:
        lora.adapt(fn)(BASE, DELTA, X)
    assert message in str(error.value)
    assert "a nonlinear function of the layer's output, which no merged weight holds" in str(error.value)
    with pytest.raises(ValueError, match="would be merged here"):
        lora.explain(fn, BASE, DELTA, X)


def energy(p, x):
    return jnp.tanh(x @ p["w"] + row(p)).sum()


def scanned(p, x):
    return jax.lax.scan(lambda total, x: (total + energy(p, x[None]), None), 0.0, x)[0]


def looped(p, x):
    step = lambda state: (state[0] + 1, state[1] + energy(p, x + state[1]))  # noqa: E731
    return jax.lax.while_loop(lambda state: state[0] < 2, step, (0, 0.0))[1]


def branched(p, x):
    return jax.lax.cond(p["scalar"] > 0, energy, lambda p, x: x.sum(), p, x)


def forward(function):
    return lambda p, x: jax.jvp(lambda x: function(p, x), (x,), (x,))


DERIVATIVES = {
    "grad": jax.grad(energy, 1),
    "grad of a scan": jax.grad(scanned, 1),
    "grad of remat": jax.grad(jax.checkpoint(energy), 1),
    "linearize": lambda p, x: jax.linearize(lambda x: energy(p, x), x)[1](x),
    "jvp": forward(energy),
    "jvp of jit": forward(jax.jit(energy)),
    "jvp of remat": forward(jax.checkpoint(energy)),
    "jvp of a scan": forward(scanned),
    "jvp of a loop": forward(looped),
    "jvp of cond": forward(branched),
}


@pytest.mark.parametrize("fn", DERIVATIVES.values(), ids=DERIVATIVES)
def test_a_derivative_of_the_base_is_not_adapted(fn):
    with pytest.raises(
        ValueError, match=r"'w': the function differentiates dot_general .* itself, and this derivative"
    ):
        lora.adapt(fn)(BASE, DELTA, X)
    derivative = jax.grad(lora.adapt(energy), 2)(BASE, DELTA, X)
    close(derivative, jax.grad(lambda x: jnp.tanh(act(x @ W + row(BASE))).sum())(X))


NAMES = Names([Weight("w", "layer", LINEAR)])

MERGES = {
    "merge": lambda delta: lora.merge(BASE, delta),
    "unmerge": lambda delta: lora.unmerge(BASE, delta),
    "unmerge from a base": lambda delta: lora.unmerge(BASE, delta, BASE),
    "switch_task": lambda delta: lora.switch_task(BASE, {}, delta),
    "switch_task back": lambda delta: lora.switch_task(BASE, delta, {}),
    "merge_quantized": lambda delta: lora.merging.merge_quantized(
        lora.quantize(BASE, {"w": lora.Int8(block=2, axes=("in", "out"))}), delta
    ),
    "combine": lambda delta: lora.combine([delta, delta], [0.5, 0.5]),
    "scale": lambda delta: lora.merging.scale(delta, 2.0),
}


@pytest.mark.parametrize("operation", MERGES.values(), ids=MERGES)
def test_no_merged_weight_is_formed(operation):
    with pytest.raises(ValueError, match=r"^'w': the (Bottleneck )?adapter is a nonlinear function of the layer's"):
        operation(DELTA)


def test_truncation_keeps_a_small_bottleneck_and_refuses_a_large_one():
    assert lora.truncate(DELTA, 3) == DELTA
    with pytest.raises(
        ValueError, match=r"'w': what a Bottleneck adapter does .* rank 2 by its factors. Leave it out\.$"
    ):
        lora.truncate(DELTA, 2)


def test_peft_has_no_such_method(tmp_path):
    with pytest.raises(ValueError, match=r"'w': PEFT's LoRA has no counterpart of Bottleneck; lora_jax.save writes it"):
        lora.peft.save(tmp_path, DELTA, NAMES)


def test_others_of_the_delta_merge_without_it():
    base = {"w": W, "v": jnp.ones((6, 3))}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    delta = moved(lora.init(jax.random.key(0), base, {"w": lora.Bottleneck(3), "v": lora.LoRA(2)}, fn, X))
    tx, adapted = optax.sgd(0.1), lora.adapt(fn)
    expected = jnp.tanh(bottleneck(X @ W, delta["w"])) @ lora.merge(base, {"v": delta["v"]})["v"]
    close(adapted(base, delta, X), expected)
    merged = lora.merge(base, {"v": delta["v"]})
    close(lora.adapt(fn)(merged, {"w": delta["w"]}, X), expected)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(0))
    step = lora.train_step(lambda base, delta, x, key: jnp.mean(adapted(base, delta, x) ** 2), tx)
    losses = []
    for _ in range(3):
        state, metrics = step(state, X)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_a_saved_bottleneck_has_its_activation(tmp_path):
    delta = moved(lora.init(jax.random.key(0), BASE, {"^w$": lora.Bottleneck(3, "tanh", axes=("in", "out"))}))
    lora.save(tmp_path / "adapter", delta, base=BASE)
    loaded = lora.load(tmp_path / "adapter", BASE)
    assert loaded["w"].activation == "tanh" and loaded["w"].norm_scale is None
    jax.tree.map(np.testing.assert_array_equal, loaded, delta)
    with pytest.raises(ValueError, match=r"norm is True, and the arrays of a layer normalization are \[\]"):
        lora.adapt(linear)(BASE, {"w": dataclasses.replace(loaded["w"], norm=True)}, X[0])
    (file,) = (tmp_path / "adapter").rglob("adapter.json")
    file.write_text(file.read_text().replace('"tanh"', '"mish"'))
    with pytest.raises(ValueError, match=r"activation='mish': expected one of 'relu', 'gelu'"):
        lora.load(tmp_path / "adapter", BASE)


def test_the_recipe_checks_its_arguments():
    with pytest.raises(
        ValueError, match=r"Bottleneck\(activation='relu6'\): expected one of 'relu', 'gelu', 'gelu_tanh'"
    ):
        lora.Bottleneck(4, "relu6")
    with pytest.raises(ValueError, match=r"Bottleneck\(size=0\): expected a positive integer"):
        lora.Bottleneck(0)
    with pytest.raises(ValueError, match=r"'table': Bottleneck acts on the output of a product; axis 0 .* is indexed"):
        lora.init(
            jax.random.key(0), {"table": W}, {"table": lora.Bottleneck(2)}, lambda p, i: p["table"][i], jnp.arange(3)
        )


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
    "gelu_tanh": jax.nn.gelu,
    "silu": lambda x: x * jax.nn.sigmoid(x),
    "swish": lambda x: x * jax.nn.sigmoid(x),
    "tanh": jnp.tanh,
}


def test_every_activation_is_the_one_of_its_name_and_zero_at_zero():
    from lora_jax.adapters import bottleneck as module

    assert module.ACTIVATIONS.keys() == ACTIVATIONS.keys()
    x = jnp.linspace(-3, 3, 7)
    for name, function in module.ACTIVATIONS.items():
        close(function(x), ACTIVATIONS[name](x))
        assert function(jnp.zeros(())) == 0


def linear(p, x):
    return x @ p["w"] + p["b"]


def members():
    axes, keys = ("in", "out"), jax.random.split(jax.random.key(0))
    return [
        moved(lora.init(key, BASE, {"^w$": lora.Bottleneck(size, norm=True, axes=axes)}), seed)
        for seed, (key, size) in enumerate(zip(keys, (2, 3)))
    ]


@pytest.mark.parametrize("other", [lora.Bottleneck(3, norm=True), lora.Bottleneck(3, "gelu"), lora.LoRA(3)])
def test_a_stack_has_one_function(other):
    delta = lora.init(jax.random.key(0), BASE, {"^w$": dataclasses.replace(other, axes=("in", "out"))})
    with pytest.raises(ValueError, match="cannot be stacked"):
        lora.stack([DELTA, delta])


@pytest.mark.parametrize("grouped", [False, True])
def test_each_example_has_its_own_bottleneck(grouped):
    deltas = members()
    stacked = lora.stack([{}, *deltas], members=4)
    ids, x = jnp.asarray([2, 0, 1, 3, 2]), X[0]
    out = jax.jit(lora.route(lora.adapt(linear), grouped=grouped))(BASE, stacked, ids, x)
    outputs = [bottleneck(x @ W + B[None], delta["w"]) for delta in deltas]
    close(out, jnp.stack([outputs[1][0], x[1] @ W + B, outputs[0][2], x[3] @ W + B, outputs[1][4]]))


def test_several_train_in_one_step_as_they_do_alone():
    deltas, adapted = members(), lora.adapt(linear)

    def loss(base, delta, x, key):
        return jnp.mean(jax.vmap(lambda x: adapted(base, delta, x))(x) ** 2)

    tx, keys, x = optax.sgd(0.1), jax.random.split(jax.random.key(1)), X[0]
    states = lora.TrainStates.create(BASE, deltas, tx, keys)
    states, _ = lora.train_many(loss, tx, batch_axes=None)(states, x)
    together = lora.unstack(states.delta, deltas)
    for delta, key, member in zip(deltas, keys, together):
        state = lora.TrainState.create(BASE, delta, tx, key)
        alone, _ = lora.train_step(loss, tx)(state, x)
        close(member, alone.delta)


@pytest.mark.parametrize("spec", [PartitionSpec("data", "model"), PartitionSpec("model", "data")])
def test_it_runs_on_explicit_mesh_axes(spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        base = {"w": jax.device_put(W, sharding), "b": jax.device_put(B, NamedSharding(mesh, PartitionSpec(spec[1])))}
        delta = jax.device_put(DELTA, lora.delta_shardings({"w": sharding}, DELTA))
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))

        def fn(p, x):
            y = jnp.einsum("bti,io->bto", x, p["w"], out_sharding=PartitionSpec("data", None, "model"))
            return y + jax.reshard(p["b"], PartitionSpec("model"))[None, None]

        out, gradient = jax.jit(jax.value_and_grad(lambda delta: lora.adapt(fn)(base, delta, x).sum()))(delta)
    expected, by_hand = jax.value_and_grad(lambda node: bottleneck(X @ W + row(BASE), node).sum())(NODE)
    close(out, expected)
    close(jax.device_get(gradient["w"]), by_hand)


class GateFunction(eqx.Module):
    """tanh(gate) ⊙ y, as a user writes it."""

    gate: lora.adapters.Factor
    description: str = eqx.field(static=True, default="y + tanh(gate)·y")

    def __call__(self, y, precision):
        del precision
        gate = jnp.tanh(self.gate.array).reshape([y.sizes[x] if x in self.gate.labels else 1 for x in y.labels])
        return lora.adapters.Factor(y.array * gate, y.labels)


@lora.adapter("test.bottleneck.Gate")
class Gate(lora.Adapter):
    gate: jax.Array = lora.adapters.trained("batch out")
    rows: tuple[int, ...] = lora.adapters.static("in")
    axes: tuple[str, ...] = lora.adapters.static()

    nonlinear = True

    def factored(self, weight):
        return self.form(on_output=GateFunction(self.factor("gate")))


def test_an_adapter_of_a_user_s_own_acts_on_the_output():
    delta = {"w": Gate(jnp.linspace(-1, 1, 6), (WIDTH,), ("in", "out"))}
    fn = lambda p, x: x @ p["w"] + row(p)  # noqa: E731
    y = fn(BASE, X)
    close(lora.adapt(fn)(BASE, delta, X), y + jnp.tanh(delta["w"].gate)[None, None] * y)
    assert "x·W + bias, then y + tanh(gate)·y" in str(lora.explain(fn, BASE, delta, X))


def transformer_shapes(width, layers, prefix):
    kernel, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, width), (width,)))
    down = jax.ShapeDtypeStruct((4 * width, width), jnp.float32)
    parts = {"attention": {"output": {"kernel": kernel, "bias": bias}}, "feed_forward": {"down": {"kernel": down}}}
    return {prefix: {str(layer): parts for layer in range(layers)}}


SHAPES = {"RoBERTa-large": (1024, 24), "GPT-2 M": (1024, 24), "GPT-2 L": (1280, 36), "GPT-3": (12288, 96)}
BOTH, LAST = "(output|down)/kernel", "down/kernel"

COUNTS = [
    # Model, placement, size, normalization, parameters: tables 2, 3 and 12 of Hu et al., 2021, by the formula of §5.1.
    ("RoBERTa-large", LAST, 16, False, 811_392),
    ("RoBERTa-large", LAST, 64, False, 3_171_840),
    ("RoBERTa-large", BOTH, 8, False, 835_968),
    ("RoBERTa-large", BOTH, 64, False, 6_343_680),
    ("GPT-2 M", LAST, 6, True, 368_784),
    ("GPT-2 M", LAST, 224, True, 11_089_152),
    ("GPT-2 M", BOTH, 112, False, 11_064_576),
    ("GPT-2 L", LAST, 8, True, 875_808),
    ("GPT-2 L", LAST, 248, True, 23_002_848),
    ("GPT-3", BOTH, 1, False, 7_078_080),
    ("GPT-3", BOTH, 4, False, 21_234_432),
    ("GPT-3", BOTH, 8, False, 40_109_568),
    ("GPT-3", BOTH, 16, False, 77_859_840),
    ("GPT-3", BOTH, 64, False, 304_361_472),
]


@pytest.mark.parametrize("model, pattern, size, norm, count", COUNTS)
def test_parameters_are_those_of_the_papers(model, pattern, size, norm, count):
    base = transformer_shapes(*SHAPES[model], "layers")
    spec = {pattern: lora.Bottleneck(size, norm=norm, axes=("in", "out"))}
    delta = jax.eval_shape(lambda key: lora.init(key, base, spec), jax.random.key(0))
    train, _ = lora.partition(delta)
    assert sum(leaf.size for leaf in jax.tree.leaves(train)) == count
    assert json.loads(json.dumps(delta[next(iter(delta))].describe()))["size"] == size
    assert lora.summary(base, delta).trainable == count


def test_the_summary_names_size_and_activation():
    assert re.search(r"Bottleneck +1 +size=3 activation=relu +45", str(lora.summary(BASE, DELTA)))
