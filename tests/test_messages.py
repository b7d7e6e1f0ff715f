"""What is said about arguments in the wrong place, and how deltas print: short, and never a whole array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lora_jax as lora


def fn(params, x):
    return jnp.tanh(x @ params["hidden"])


BASE, X = {"hidden": jnp.ones((64, 8)), "bias": jnp.ones(8)}, jnp.ones((2, 64))


@functools.cache
def delta():
    return lora.init(jax.random.key(0), BASE, {"hidden": lora.LoRA(2)}, fn, X)


def halves():
    return lora.partition(delta())


def create(base, delta):
    return lora.TrainState.create(base, delta, optax.sgd(0.1), jax.random.key(1))


KEY, LINEAR = jax.random.key(0), nnx.Linear(64, 8, rngs=nnx.Rngs(0))
ADAPTED = r"takes the function itself.*got a result of lora\.adapt"
EXCHANGED = "base and delta are exchanged; the base comes first"
JOIN = r"join\(train, frozen\)"
CALLS = {
    "adapted, exchanged": (lambda: lora.adapt(fn)(delta(), BASE, X), EXCHANGED),
    "adapted, delta last": (
        lambda: lora.adapt(fn)(BASE, X, delta()),
        r"got float32\[2,64\]|got f32\[2,64\]: the delta is the second",
    ),
    "merge, exchanged": (lambda: lora.merge(delta(), BASE), EXCHANGED),
    "explain, exchanged": (lambda: lora.explain(fn, delta(), BASE, X), EXCHANGED),
    "summary, exchanged": (lambda: lora.summary(delta(), BASE), EXCHANGED),
    "unmerge, exchanged": (lambda: lora.unmerge(delta(), BASE), r"'hidden'\]: expected an Adapter, got f32\[64,8\]"),
    "switch_task, a base": (lambda: lora.switch_task(BASE, BASE, delta()), r"'hidden'\]: expected an Adapter"),
    "init, exchanged": (lambda: lora.init(jax.random.key(0), {"hidden": lora.LoRA(2)}, BASE), r"f32\[64,8\]"),
    "adapted, a half": (lambda: lora.adapt(fn)(BASE, halves()[0], X), JOIN),
    "adapted, both halves": (lambda: lora.adapt(fn)(BASE, halves(), X), JOIN),
    "merge, a half": (lambda: lora.merge(BASE, halves()[0]), JOIN),
    "stack, halves": (lambda: lora.stack([halves()[0]]), JOIN),
    "truncate, a half": (lambda: lora.truncate(halves()[0], 1), JOIN),
    "combine, a base": (lambda: lora.combine([BASE], [1.0]), r"'hidden'\]: expected an Adapter"),
    "stack, one delta": (lambda: lora.stack(delta()), r"stack\(\[delta\]\)"),
    "save, exchanged": (lambda: lora.save(delta(), "adapter"), r"lora\.save\(directory, delta\)"),  # pyrefly: ignore
    "save, a half": (lambda: lora.save("adapter", halves()[0]), JOIN),
    "TrainState.create, exchanged": (lambda: create(delta(), BASE), r"'hidden'\]: expected an Adapter"),
    "TrainState.create, a half": (lambda: create(BASE, halves()[0]), JOIN),
    "route, exchanged": (lambda: lora.route(lora.adapt(fn))(BASE, [0, 1], delta(), X), "got list"),
    "adapted, a mask": (lambda: lora.adapt(fn)(BASE, lora.trainable_mask(delta()), X), "is a mask"),
    "init, key and base": (lambda: lora.init(BASE, jax.random.key(0), {"hidden": lora.LoRA(2)}), "PRNG key.*got dict"),
    "init, a seed": (lambda: lora.init(0, BASE, {"hidden": lora.LoRA(2)}, fn, X), "PRNG key.*got int"),  # pyrefly: ignore
    "init, keys": (
        lambda: lora.init(jax.random.split(jax.random.key(0)), BASE, {"hidden": lora.LoRA(2)}),
        "array of keys",
    ),
    "TrainState.create, a seed": (
        lambda: lora.TrainState.create(BASE, delta(), optax.sgd(0.1), 0),  # pyrefly: ignore
        "PRNG key.*got int",
    ),
    "TrainStates.create, seeds": (
        lambda: lora.TrainStates.create(BASE, [delta()] * 2, optax.sgd(0.1), [0, 1]),
        "PRNG key.*got int",
    ),
    "partition, the base": (lambda: lora.partition(BASE), r"expected a tree of adapters, got leaves such as f32"),
    "adapted, keys": (lambda: lora.adapt(fn)(BASE, delta(), X, dropout_key=jax.random.split(KEY)), "array of keys"),
    "explain, adapted": (lambda: lora.explain(lora.adapt(fn), BASE, delta(), X), ADAPTED),
    "explain, adapted and compiled": (lambda: lora.explain(jax.jit(lora.adapt(fn)), BASE, delta(), X), ADAPTED),
    "init, adapted": (lambda: lora.init(KEY, BASE, {"hidden": lora.LoRA(2)}, lora.adapt(fn), X), ADAPTED),
    "quantize, adapted": (lambda: lora.quantize(BASE, {"": lora.NF4()}, lora.adapt(fn), X), ADAPTED),
    "adapt, adapted": (lambda: lora.adapt(lora.adapt(fn)), ADAPTED),
    "adapt, a Linen module": (lambda: lora.adapt(linen.Dense(2)), r"Linen module \(Dense\): pass its apply method"),
    "init, an NNX module": (
        lambda: lora.init(KEY, BASE, {"hidden": lora.LoRA(2)}, LINEAR, X),
        r"nnx\.functional\(model\)",
    ),
    "explain, base first": (lambda: lora.explain(BASE, delta(), fn, X), r"explain takes a function.*got dict"),  # pyrefly: ignore
    "quantize, fn first": (lambda: lora.quantize(fn, BASE, {"": lora.NF4()}, X), "takes a format.*got f32"),  # pyrefly: ignore
    "quantize, a delta": (lambda: lora.quantize(delta(), {"": lora.NF4()}), "got adapters"),
    "merge, a state": (lambda: lora.merge(BASE, create(BASE, delta())), r"give its delta, state\.delta"),  # pyrefly: ignore
    "merge, a stack": (lambda: lora.merge(BASE, lora.stack([delta()] * 3)), "This is a stack: lora.route"),
    "peft.save, no names": (lambda: lora.peft.save("adapter", delta(), {}), r"lora\.peft\.Names.*got dict"),  # pyrefly: ignore
    "peft.load, exchanged": (
        lambda: lora.peft.load(BASE, "adapter", lora.peft.Names(())),  # pyrefly: ignore
        r"expected a path as directory, got dict",
    ),
    "restore_state, exchanged": (
        lambda: lora.restore_state(optax.sgd(0.1), BASE, "state"),  # pyrefly: ignore
        r"restore_state.*expected a path as directory, got Gradient",
    ),
    "a key that is a number": (lambda: lora.adapt(fn)(BASE, delta(), X, dropout_key=3), "PRNG key.*got int"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_get_one_short_sentence(name):
    call, message = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call()
    assert len(str(caught.value)) < 220 and "\n" not in str(caught.value)


def test_a_function_that_calls_an_adapted_one_is_a_function():
    """`functools.wraps` copies the attributes of what it wraps."""
    inner = lora.adapt(fn)

    @functools.wraps(inner)
    def outer(params, x):
        return inner(params, delta(), x)

    assert list(lora.init(KEY, BASE, {"hidden": lora.LoRA(2)}, outer, X)) == ["hidden"]
    assert lora.explain(outer, BASE, delta(), X)["hidden"]


def test_adapters_print_shapes():
    assert repr(delta()) == "{'hidden': LoRAAdapter(a=f32[2,64], b=f32[2,8], scale=f32[], dropout=f32[])}"
    train = halves()[0]
    assert repr(train["hidden"]) == "LoRAAdapter(a=f32[2,64], b=f32[2,8], scale=None, dropout=None)"
    assert repr(lora.trainable_mask(delta())["hidden"]) == "LoRAAdapter(a=True, b=True, scale=False, dropout=False)"
    shapes = jax.eval_shape(lambda: delta())["hidden"]
    assert repr(shapes) == repr(delta()["hidden"]) == repr(jax.tree.map(np.asarray, delta()["hidden"]))
    traced = []
    jax.jit(lambda node: traced.append(repr(node)))(delta()["hidden"])
    assert traced == [repr(shapes)]
    rows = lora.init(jax.random.key(0), BASE, {"hidden": lora.Rows([1, 3])}, lambda p, i: p["hidden"][i], jnp.arange(2))
    assert "ids=i32[2]" in repr(rows)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), delta()["hidden"])
    assert repr(narrow).startswith("LoRAAdapter(a=bf16[2,64]")


def test_states_print_shapes():
    tx, adapter = optax.adam(0.1), delta()
    state = lora.TrainState.create(BASE, adapter, tx, KEY)
    assert repr(state) == (
        "TrainState(base={'bias': f32[8], 'hidden': f32[64,8]}, "
        f"delta={adapter}, opt_state=(ScaleByAdamState(count=i32[], mu={halves()[0]}, nu={halves()[0]}), "
        "EmptyState()), step=i32[], key=key<fry>[])"
    )
    states = repr(lora.TrainStates.create(BASE, [adapter] * 3, tx, [KEY] * 3))
    assert states.startswith(
        "TrainStates(base={'bias': f32[8], 'hidden': f32[64,8]}, delta={'hidden': LoRAAdapter(a=f32[3,2,64]"
    )
    assert "active=bool[3]" in states and "\n" not in states
    quantized = lora.quantize(BASE, {"hidden": lora.Int8()}, fn, X)
    assert "Quantized(u8[64,8]" in repr(lora.TrainState.create(quantized, adapter, tx, KEY))


def test_summaries_print_a_table_in_an_interpreter():
    table = lora.summary(BASE, delta())
    assert repr(table) == str(table) and repr(table).startswith("weights  adapter")


def test_explanations_print_a_line_for_each_use():
    def twice(params, x):
        return fn(params, x) @ jnp.sin(params["hidden"]).T

    explained = lora.explain(twice, BASE, delta(), X)
    lines = repr(explained).splitlines()
    assert lines == str(explained).splitlines() and len(lines) == 2
    for line, name in zip(lines, ("(fn)", "(twice)"), strict=True):
        assert "at test_messages.py:" in line and name in line and "/" not in line.split(": ")[1]
        assert len(line) < 120


@pytest.mark.parametrize(
    "recipe",
    [lora.LoRA(2), lora.DoRA(2), lora.Full(), lora.Rows([0, 1]), lora.IA3(), lora.LoHa(2), lora.LoRA(2, init="pissa")],
    ids=lambda recipe: type(recipe).__name__,
)
def test_numpy_float64_warns_no_more_than_the_function(recipe):
    """Warnings are errors here; JAX warns where code asks for float64 while x64 is off."""
    rng = np.random.default_rng(0)
    base, x = {"hidden": rng.normal(size=(6, 4))}, rng.normal(size=(3, 6))
    prepared, changes = lora.prepare(jax.random.key(0), base, {"hidden": recipe}, fn, [(x,)])
    adapted = lora.adapt(fn)
    expected = fn(base, x)
    for function in (adapted, adapted, jax.jit(adapted)):
        np.testing.assert_allclose(function(prepared, changes, x), expected, atol=1e-5)
    merged = lora.merge(prepared, changes)
    assert merged["hidden"].dtype == expected.dtype == jnp.float32
    lora.unmerge(merged, changes, prepared)
    stacked = lora.stack([changes, {}], base=prepared)
    lora.route(adapted)(prepared, stacked, [0, 1, 0], x)
    str(lora.explain(fn, prepared, changes, x)), str(lora.summary(prepared, changes))
    train, frozen = lora.partition(changes)
    jax.grad(lambda train: adapted(prepared, lora.join(train, frozen), x).sum())(train)


def test_numpy_keeps_what_is_not_adapted():
    base = {"hidden": np.ones((6, 4)), "table": np.ones((3, 2))}
    changes = lora.init(jax.random.key(0), base, {"hidden": lora.LoRA(2, axes=("in", "out"))})
    assert lora.merge(base, changes)["table"] is base["table"]
