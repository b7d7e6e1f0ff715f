"""Quantized bases under adapt: what the backward pass keeps, what XLA may not share, where views and lookups end."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quantized_bases import FORMATS, quantize

import lora_jax as lora

FORM = lora.NF4(block=16)
STORED = {name: form for name, form in FORMATS.items() if name != "NF4"}
WIDTH = 64


def layers(base, x):
    """Two layers, each with its own kernels."""
    for layer in base["layers"]:
        x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def scanned(base, x):
    """The same from stacks, rematerialized."""

    @jax.checkpoint
    def body(x, layer):
        return x + jnp.tanh(x @ layer["up"].astype(x.dtype)) @ layer["down"].astype(x.dtype), None

    return jax.lax.scan(body, x, base)[0]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[-2])


UNROLLED = {"layers": [{"up": normal(i, WIDTH, 96), "down": normal(i + 5, 96, WIDTH)} for i in range(2)]}
STACKED = {"up": normal(1, 3, WIDTH, 96), "down": normal(2, 3, 96, WIDTH)}
X = jax.random.normal(jax.random.key(9), (4, WIDTH))
RECIPES = {
    "LoRA": lora.LoRA(4, init="orthogonal"),
    "DoRA": lora.DoRA(4),
    "DoRA_norm_gradient": lora.DoRA(4, norm_gradient=True),
    "DVoRA": lora.DVoRA(4),
    "AdaLoRA": lora.AdaLoRA(4),
    "IA3": lora.IA3(),
}
FUNCTIONS = {"unrolled": (layers, UNROLLED), "scanned": (scanned, STACKED)}


def build(function, recipe, *, form=FORM, some=""):
    """The function, the quantized base, and a loss of the trained leaves, which are moved from their start."""
    fn, base = FUNCTIONS[function]
    base = quantize(base, {"": form}, fn, X)
    delta = lora.init(jax.random.key(0), base, {some: RECIPES[recipe]}, fn, X)
    train, frozen = lora.partition(delta)
    train = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), train)
    adapted = lora.adapt(fn)

    def loss(train, base):
        return jnp.sum(jnp.sin(adapted(base, lora.join(train, frozen), X)))

    return base, train, loss


def weight_sized(tree):
    """The floats as large as one layer's weight."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [leaf.shape for leaf in floats if leaf.size >= WIDTH * 96]


CASES = [(function, recipe, "NF4") for function in FUNCTIONS for recipe in RECIPES]


@pytest.mark.parametrize(
    "function, recipe, form", [*CASES, *(("scanned", "DoRA_norm_gradient", form) for form in STORED)]
)
def test_gradients_are_those_through_the_dequantized_weights(function, recipe, form):
    base, train, loss = build(function, recipe, form=STORED.get(form, FORM))
    gradients = jax.jit(jax.grad(loss))(train, base)
    expected = jax.jit(jax.grad(loss))(train, lora.dequantize(base))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    "function, recipe, form",
    [*CASES, *((function, recipe, form) for function in FUNCTIONS for recipe in ("LoRA", "DoRA") for form in STORED)],
)
def test_no_float_of_a_weight_s_size_waits_for_the_backward_pass(function, recipe, form):
    base, train, loss = build(function, recipe, form=STORED.get(form, FORM))

    def residuals(base):
        return jax.eval_shape(lambda train: jax.vjp(lambda train: loss(train, base), train)[1], train)

    assert weight_sized(residuals(base)) == []
    if "scanned" not in function:  # (whose own rematerialization keeps no more than stacks that are arguments)
        assert weight_sized(residuals(lora.dequantize(base))) != []


@pytest.mark.parametrize(
    "form, some",
    [(FORM, ""), (FORM, "up"), (lora.Q4_0(), ""), (lora.Q4_1(), "")],
    ids=["NF4_all_adapted", "NF4_some_adapted", "Q4_0", "Q4_1"],
)
def test_each_pass_dequantizes_for_itself(form, some):
    """What is lowered for a TPU dequantizes once a weight and pass, between two barriers, and again behind a third.

    (That XLA keeps to it was seen in a compile. On a CPU a region is a branch of a conditional: test_loops.py.)
    """
    base, train, loss = build("unrolled", "LoRA", form=form, some=some)

    def counts(function):
        text = jax.jit(function).trace(train, base).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("shift_right_logical"), text.count("optimization_barrier")

    assert counts(loss) == (4, 2 * 4)
    # Of the first layer's first weight no input needs a gradient: nothing before it trains.
    assert counts(jax.grad(loss)) == (4 + 3, 2 * 4 + 3 * 3)


@pytest.mark.parametrize("form", [FORM, *STORED.values()], ids=["NF4", *STORED])
def test_the_compiled_step_holds_fewer_bytes_than_with_weights_dequantized_before_it(form):
    base, train, loss = build("scanned", "LoRA", form=form)

    def temporaries(step):
        return jax.jit(jax.grad(step)).lower(train, base).compile().memory_analysis().temp_size_in_bytes

    whole = sum(leaf.size * 4 for leaf in STACKED.values())
    ours = temporaries(loss)
    plain = temporaries(lambda train, base: loss(train, lora.dequantize(base)))
    assert plain - ours > 0.6 * whole


@pytest.mark.parametrize("recipe", ["LoRA", "DoRA", "DVoRA"])
def test_outside_of_jit_nothing_compiles_again(recipe, caplog):
    fn = lambda base, x: x @ base["w"][1]  # noqa: E731
    base = lora.quantize({"w": normal(0, 2, WIDTH, 32)}, {"w": lora.NF4(16, axes=("batch", "in", "out"))})
    delta = lora.init(jax.random.key(0), base, {"w": dataclasses.replace(RECIPES[recipe], axes=("batch", "in", "out"))})
    adapted = lora.adapt(fn)
    jax.block_until_ready(adapted(base, delta, X))
    with jax.log_compiles():
        adapted(base, delta, X)
    assert [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()] == []


def test_a_training_step_moves_the_adapters_only(lenient):
    base, _, _ = build("scanned", "LoRA")
    adapted = lora.adapt(scanned)
    delta = lora.init(jax.random.key(0), base, {"": lora.LoRA(4)}, scanned, X)
    tx = optax.adam(1e-2)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    step = lora.train_step(lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - 1) ** 2), tx)
    losses = []
    for _ in range(5):
        state, metrics = step(state, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert jax.tree.structure(state.base) == jax.tree.structure(base)
    for one, other in zip(jax.tree.leaves(state.base), jax.tree.leaves(base)):
        np.testing.assert_array_equal(one, other)


def test_many_adapters_on_one_quantized_base():
    base, train, loss = build("scanned", "LoRA")
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), train)
    together = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None)))(both, base)
    for member in range(2):
        alone = jax.jit(jax.grad(loss))(jax.tree.map(lambda leaf: leaf[member], both), base)  # noqa: B023
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(one[member], other, rtol=1e-4, atol=1e-4)


def test_routing_examples_over_a_quantized_base():
    base = lora.quantize({"w": normal(0, WIDTH, 8)}, {"w": FORM}, lambda base, x: x @ base["w"], X)
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    deltas = [lora.init(jax.random.key(i), base, {"w": lora.LoRA(2, init="orthogonal")}, fn, X) for i in range(2)]
    routed = lora.route(lora.adapt(fn))
    out = routed(base, lora.stack(deltas), jnp.asarray([1, 0, 0, 1]), X)
    for row, member in enumerate([1, 0, 0, 1]):
        np.testing.assert_allclose(out[row], fn(lora.merge(base, deltas[member]), X[row]), rtol=1e-4, atol=1e-5)


def test_train_many_over_a_quantized_base(lenient):
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    base = lora.quantize({"w": normal(0, WIDTH, 8)}, {"w": FORM}, fn, X)
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2)}, fn, X)
    adapted = lora.adapt(fn)
    loss = lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - 1) ** 2)  # noqa: E731
    keys, rates = jax.random.split(jax.random.key(1), 2), [1e-2, 1e-3]
    states = lora.TrainStates.create(base, [delta] * 2, lambda lr: optax.sgd(lr), keys, {"lr": rates})
    states, metrics = lora.train_many(loss, lambda lr: optax.sgd(lr), batch_axes=None)(states, X)
    for member, rate in enumerate(rates):
        state = lora.TrainState.create(base, delta, optax.sgd(rate), keys[member])
        state, alone = lora.train_step(loss, optax.sgd(rate))(state, X)
        np.testing.assert_allclose(metrics["loss"][member], alone["loss"], rtol=1e-5)


IDS = jnp.asarray([[1, 2, 9], [0, 0, 1]])
LOOKUPS = {
    "index": lambda table: table[IDS],
    "take": lambda table: jnp.take(table, IDS, axis=0),
    "past the end": lambda table: jnp.take(table, IDS + 3, axis=0),
    "clipped": lambda table: jnp.take(table, IDS + 3, axis=0, mode="clip"),
    "filled with zeros": lambda table: table.at[IDS + 3].get(mode="fill", fill_value=0.0),
    "cast before": lambda table: table.astype(jnp.bfloat16)[IDS],
}


LOOKUP_CASES = [(name, "NF4") for name in LOOKUPS]
LOOKUP_CASES += [(name, form) for name in ("past the end", "filled with zeros") for form in STORED]


@pytest.mark.parametrize("name, form", LOOKUP_CASES)
def test_rows_of_a_quantized_table_are_looked_up_by_their_codes(name, form):
    fn = lambda base: LOOKUPS[name](base["table"])  # noqa: E731
    base = quantize({"table": normal(0, 10, WIDTH)}, {"table": STORED.get(form, FORM)}, fn)
    delta = lora.init(jax.random.key(0), base, {"table": lora.LoRA(2)}, fn)
    adapted = lora.adapt(fn)
    np.testing.assert_array_equal(adapted(base, {}), fn(lora.dequantize(base)))
    np.testing.assert_allclose(
        *(jnp.asarray(out, jnp.float32) for out in (adapted(base, delta), fn(lora.merge(base, delta)))), rtol=1e-2
    )
    text = str(jax.make_jaxpr(lambda delta: adapted(base, delta))(delta))
    assert "f32[10,64]" not in text and "bf16[10,64]" not in text


@pytest.mark.parametrize(
    "name, fn",
    [
        ("filled with another number", lambda base: base["w"].at[IDS + 3].get(mode="fill", fill_value=2.0)),
        ("columns", lambda base: base["w"][:, IDS]),
        ("a row", lambda base: base["w"][3]),
    ],
)
def test_other_lookups_are_right_too(name, fn):
    base = lora.quantize({"w": normal(0, 10, WIDTH)}, {"w": lora.NF4(16, axes=("lookup", "out"))})
    # Compiled together and apart, codes times scales round differently.
    np.testing.assert_allclose(lora.adapt(fn)(base, {}), fn(lora.dequantize(base)), rtol=3e-7)


@pytest.mark.parametrize(
    "use, form",
    [
        *((use, FORM) for use in ("slice", "index", "dynamic_index", "gather")),
        ("slice", lora.Q8_0()),
        ("index", lora.Q4_0()),
        ("dynamic_index", lora.Q4_1()),
        ("gather", lora.Q4_K()),
    ],
    ids=str,
)
def test_one_layer_of_a_stack_is_a_slice_of_codes(use, form):
    parts = {
        "slice": lambda w: w[1:2].reshape(WIDTH, WIDTH),
        "index": lambda w: w[1],
        "dynamic_index": lambda w: jax.lax.dynamic_index_in_dim(w, IDS[0, 0], keepdims=False),
        "gather": lambda w: jnp.take(w, IDS[0, 0], axis=0),
    }
    fn = lambda base, x: jnp.tanh(x @ parts[use](base["w"]))  # noqa: E731
    axes = ("batch", "in", "out")
    base = quantize({"w": normal(3, 4, WIDTH, WIDTH)}, {"w": dataclasses.replace(form, axes=axes)})
    delta = lora.init(
        jax.random.key(0), base, {"w": lora.LoRA(2, init="orthogonal", axes=("batch", "in", "out"))}, fn, X
    )
    adapted = lora.adapt(fn)
    np.testing.assert_allclose(adapted(base, delta, X), fn(lora.merge(base, delta), X), rtol=1e-4, atol=1e-5)
    assert "f32[4,64,64]" not in str(jax.make_jaxpr(lambda delta: adapted(base, delta, X))(delta))


def test_a_stack_without_layers_of_its_own_is_dequantized_before_the_scan_and_said_so():
    fn = lambda base, x: jax.lax.scan(lambda x, w: (x, x @ w), x, base["w"])[1]  # noqa: E731
    weight = normal(3, 4, WIDTH, 8)
    base = lora.quantize({"w": jnp.swapaxes(weight, 1, 2)}, {"w": lora.NF4(16, axes=("batch", "out", "in"))})
    turned = lambda base, x: fn({"w": jnp.swapaxes(base["w"], 1, 2)}, x)  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("batch", "out", "in"))}, turned, X)
    explained = str(lora.explain(turned, base, delta, X))
    assert "dequantized as a whole: its blocks have no leading axis to scan over" in explained
    np.testing.assert_allclose(
        lora.adapt(turned)(base, delta, X), turned(lora.merge(base, delta), X), rtol=1e-5, atol=1e-5
    )


def test_what_has_no_rule_is_dequantized_where_it_happens():
    fn = lambda base, x: x @ jnp.sin(base["w"])  # noqa: E731
    base = lora.quantize({"w": normal(0, WIDTH, 8)}, {"w": lora.NF4(16, axes=("in", "out"))})
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))}, fn, X)
    (use,) = lora.explain(fn, base, delta, X)["w"]
    assert not use.factored and "no factored form of sin" in use.reason
    np.testing.assert_allclose(lora.adapt(fn)(base, {}, X), fn(lora.dequantize(base), X), rtol=1e-5, atol=1e-5)
    (bare,) = lora.explain(fn, base, {}, X)["w"]
    assert not bare.factored  # what comes of it waits for the backward pass, as any array does


def test_a_delta_for_another_shape_is_told():
    base, _, _ = build("unrolled", "LoRA")
    delta = {
        "layers/0/up": lora.init(jax.random.key(0), {"w": normal(0, 4, 4)}, {"w": lora.LoRA(2, axes=("in", "out"))})[
            "w"
        ]
    }
    with pytest.raises(ValueError, match=r"'layers/0/up' is for a weight of shape \(4, 4\); the base has \(64, 96\)"):
        lora.adapt(layers)(base, delta, X)
