"""A quantized weight is dequantized where it is used: no loop, and no unrolled model, holds all weights as floats."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from quantized_bases import FORMATS, quantize

import lora_jax as lora

LAYERS, WIDTH = 6, 256  # whole blocks of every format
WEIGHT = WIDTH * WIDTH * 4
X = jax.random.normal(jax.random.key(9), (4, WIDTH))
RECIPES = {
    "base alone": None,
    "LoRA": lora.LoRA(2, init="orthogonal"),
    "DoRA": lora.DoRA(2),
    "DoRA, norm gradient": lora.DoRA(2, norm_gradient=True),
    "IA3": lora.IA3(),
}


def model(params, x):
    for layer in params:
        x = x + jnp.tanh(x @ layer)
    return x


def convolutions(params, x):
    for layer in params:
        kernel = layer.reshape(4, WIDTH // 2, WIDTH // 2)
        x = jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.tanh(x)


FLOATS = [jax.random.normal(jax.random.key(i), (WIDTH, WIDTH)) / 16 for i in range(LAYERS)]
BASE = lora.quantize(FLOATS, {"": lora.NF4(axes=("in", "out"))})
PLAIN = lora.dequantize(BASE)
STORED = {
    name: quantize(FLOATS, {"": dataclasses.replace(form, axes=("in", "out"))})
    for name, form in FORMATS.items()
    if name != "NF4"
}


def problem(recipe, fn=model, x=X):
    spec = {} if RECIPES[recipe] is None else {"": RECIPES[recipe]}
    delta = lora.init(jax.random.key(0), BASE, spec, fn, x) if spec else {}
    return lora.adapt(fn), delta


def temporaries(function, *args):
    """In weights as floats."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes / WEIGHT


def loops(adapted):
    """Functions of (base, delta, x)."""

    def gradient(base, delta, x):
        train, frozen = lora.partition(delta)
        return jax.grad(lambda train: jnp.mean(adapted(base, lora.join(train, frozen), x) ** 2))(train)

    def accumulated(base, delta, x):
        def add(total, scale):
            return jax.tree.map(jnp.add, total, gradient(base, delta, scale * x)), None

        start = jax.tree.map(jnp.zeros_like, lora.partition(delta)[0])
        return jax.lax.scan(add, start, jnp.arange(4.0))[0]

    def nested(base, delta, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.fori_loop(0, 3, lambda j, x: adapted(base, delta, x), x), x)

    def through_the_loop(base, delta, x):
        train, frozen = lora.partition(delta)

        def loss(train):
            step = lambda x, _: (adapted(base, lora.join(train, frozen), x), None)  # noqa: E731
            return jnp.mean(jax.lax.scan(step, x, length=3)[0] ** 2)

        return jax.grad(loss)(train)

    return {
        "one call": adapted,
        "fori_loop": lambda base, delta, x: jax.lax.fori_loop(0, 8, lambda i, x: adapted(base, delta, x), x),
        "while_loop": lambda base, delta, x: jax.lax.while_loop(
            lambda state: state[0] < 8, lambda state: (state[0] + 1, adapted(base, delta, state[1])), (0, x)
        )[1],
        "nested": nested,
        "vmap in a loop": lambda base, delta, x: jax.lax.fori_loop(
            0, 8, lambda i, x: jax.vmap(lambda x: adapted(base, delta, x))(x), x
        ),
        "loop under vmap": lambda base, delta, x: jax.vmap(
            lambda x: jax.lax.fori_loop(0, 8, lambda i, x: adapted(base, delta, x), x)
        )(x),
        "gradient": gradient,
        "accumulated gradient": accumulated,
        "gradient of a loop": through_the_loop,
    }


@pytest.mark.parametrize("loop", loops(None))
def test_at_most_two_weights_are_floats_at_once(loop):
    adapted, delta = problem("LoRA")
    function = loops(adapted)[loop]
    assert temporaries(function, BASE, delta, X) - temporaries(function, PLAIN, delta, X) < 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_of_every_kind_of_adapter(recipe):
    adapted, delta = problem(recipe)
    names = ["fori_loop", "accumulated gradient"] if delta else ["one call", "fori_loop"]
    for name in names:
        assert temporaries(loops(adapted)[name], BASE, delta, X) < 3, name


@pytest.mark.parametrize("form", STORED)
def test_of_every_format(form):
    adapted, delta = problem("LoRA")
    for name in ("fori_loop", "accumulated gradient"):
        assert temporaries(loops(adapted)[name], STORED[form], delta, X) < 3, name


def test_of_convolutions():
    x = X.reshape(1, 8, WIDTH // 2)
    delta = {}
    adapted = lora.adapt(convolutions)
    assert temporaries(loops(adapted)["fori_loop"], BASE, delta, x) < 3


def test_of_a_training_step_that_accumulates():
    adapted, delta = problem("LoRA")
    tx = optax.sgd(1e-3)
    step = lora.train_step(lambda base, delta, x, key: jnp.mean(adapted(base, delta, x) ** 2), tx, accumulate=4)
    state = lora.TrainState.create(BASE, delta, tx, jax.random.key(1))
    x = jnp.concatenate([X] * 4)
    assert temporaries(lambda state, x: step(state, x), state, x) < 3


@pytest.mark.parametrize(
    "loop, form",
    [
        *((loop, "NF4") for loop in ("one call", "fori_loop", "while_loop", "nested")),
        *(("fori_loop", f) for f in STORED),
    ],
)
def test_values_are_those_of_the_dequantized_weights_to_the_bit(loop, form):
    adapted, delta = problem("LoRA")
    function, base = jax.jit(loops(adapted)[loop]), STORED.get(form, BASE)
    np.testing.assert_array_equal(function(base, delta, X), function(lora.dequantize(base), delta, X))


def test_gradients_are_those_of_the_dequantized_weights():
    adapted, delta = problem("DoRA, norm gradient")
    delta = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), delta)
    for name in ("accumulated gradient", "gradient of a loop"):
        function = jax.jit(loops(adapted)[name])
        ours, plain = function(BASE, delta, X), function(PLAIN, delta, X)
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(jnp.abs(other).max()))


def test_examples_under_vmap_share_the_codes_and_no_nan():
    adapted, delta = problem("LoRA")
    function = jax.jit(loops(adapted)["loop under vmap"])
    text = function.lower(BASE, delta, X).compile().as_text()
    sizes = "|".join(f"{WIDTH // part},{WIDTH}" for part in (1, 2))
    assert not re.search(rf"\[{len(X)},(?:{sizes})\]", text)
    out = function(BASE, delta, X.at[1, 3].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(out).any(1), [False, True, False, False])
    np.testing.assert_array_equal(out[2], function(BASE, delta, X)[2])


def collectives(function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}


@pytest.mark.parametrize(
    "kind, divided, form",
    [
        *((kind, divided, lora.NF4(32)) for kind in ("Auto", "Explicit") for divided in ("batch", "out", "in")),
        ("Auto", "in", lora.Q4_1()),
        ("Explicit", "in", lora.Q8_0()),
        ("Auto", "out", lora.Q4_0()),
        ("Explicit", "out", lora.Q4_K()),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_mesh_has_no_more_collectives(kind, divided, form):
    mesh = jax.make_mesh((4,), ("m",), axis_types=(getattr(jax.sharding.AxisType, kind),), devices=jax.devices()[:4])
    adapted, delta = problem("LoRA")

    def fn(params, x):
        return x @ params[0] if divided != "in" or kind == "Auto" else jnp.matmul(x, params[0], out_sharding=P())

    weight, batch = {"batch": (P(), P("m")), "out": (P(None, "m"), P()), "in": (P("m"), P(None, "m"))}[divided]
    with jax.set_mesh(mesh):
        placed = jax.device_put(PLAIN[:1], NamedSharding(mesh, weight))
        base = quantize(placed, {"": dataclasses.replace(form, axes=("in", "out"))})
        x = jax.device_put(X, NamedSharding(mesh, batch))
        adapted, delta = lora.adapt(fn), {"0": delta["0"]}
        ours, plain = collectives(adapted, base, delta, x), collectives(adapted, placed, delta, x)
    assert ours["all-reduce"] == plain["all-reduce"] == (divided == "in")
    assert sum(ours.values()) - ours["all-gather"] == sum(plain.values()) - plain["all-gather"]


def test_inside_shard_map_each_device_dequantizes_where_it_uses():
    mesh = jax.make_mesh((4,), ("m",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    adapted, delta = problem("LoRA")

    def mapped(base, delta, x):
        specs = {"in_specs": (P(), P(), P("m")), "out_specs": P("m")}
        return jax.shard_map(lambda *args: adapted(*args), mesh=mesh, **specs)(base, delta, x)

    np.testing.assert_allclose(jax.jit(mapped)(BASE, delta, X), adapted(PLAIN, delta, X), rtol=1e-4, atol=1e-5)
    assert temporaries(loops(mapped)["accumulated gradient"], BASE, delta, X) < 3
    assert sum(collectives(loops(mapped)["fori_loop"], BASE, delta, X).values()) == 0
    ours, plain = (collectives(loops(mapped)["accumulated gradient"], base, delta, X) for base in (BASE, PLAIN))
    assert ours == plain
