"""stack(), swap(), unstack(), route() and train_many(): many adapters over one base are as many single ones."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.jaxpr_checks import equations
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora

BATCH, LENGTH = 7, 5


def fn(base, x):
    hidden = jnp.matmul(x, base["w"])
    return jnp.matmul(jnp.tanh(hidden + jnp.broadcast_to(base["bias"], hidden.shape)), base["head"])


def layers(base, x):
    """A model of two layers in a scan, rematerialized, with a jit inside."""

    @jax.checkpoint
    def layer(x, w):
        return jax.jit(lambda x: jnp.tanh(jnp.matmul(x, w)))(x), None

    return jax.lax.scan(layer, x, base["layers"])[0]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


FAMILIES = {
    "AdaLoRA": lora.AdaLoRA,
    "DVoRA": lora.DVoRA,
    "IA3": lambda rank: lora.IA3(),
    "LoHa": lora.LoHa,
    "LoKr": lora.LoKr,
    "LoRAFA": lora.LoRAFA,
    "VeRA": lora.VeRA,
}

EXPERTS = {
    "DoRA": lora.DoRA,
    "Full": lambda rank: lora.Full(),
    "LoHa": lora.LoHa,
    "LoKr": lora.LoKr,
}

BASE = {
    "w": normal(0, 4, 6),
    "bias": jnp.ones(6),
    "head": normal(1, 6, 8),
    "layers": normal(2, 2, 4, 4),
    "families": {path: normal(seed, 4, 4) for seed, path in enumerate(FAMILIES)},
    "experts": {path: normal(seed, 2, 4, 4) for seed, path in enumerate((*EXPERTS, "plain"))},
}
X = normal(3, BATCH, LENGTH, 4)
IDS = [2, 0, 1, 2, 3, 0, 2]


def make_delta(seed, spec, function=fn):
    """A delta that changes something."""
    delta = lora.init(jax.random.key(seed), BASE, spec, function, X[0])
    train, frozen = lora.partition(delta)
    moved = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), train)
    return lora.join(moved, frozen)


@functools.cache
def low_rank():
    """Members of different ranks on different layers, one that changes nothing among them."""
    return [
        make_delta(1, {"^w$": lora.LoRA(1, alpha=2)}),
        {},
        make_delta(2, {"^w$": lora.LoRA(3), "head": lora.LoRA(2, alpha=8)}),
        make_delta(3, {"head": lora.LoRA(1)}),
    ]


@functools.cache
def other_kinds():
    return [
        make_delta(1, {"^w$": lora.DoRA(2), "bias": lora.Full(), "head": lora.LoRA(2, blocks=4)}),
        {},
        make_delta(2, {"^w$": lora.DoRA(1, alpha=3)}),
        make_delta(3, {"bias": lora.Full(), "head": lora.LoRA(1, blocks=4)}),
    ]


@functools.cache
def scanned():
    axes = ("batch", "in", "out")
    spec = [{"layers": lora.LoRA(rank, alpha=3, axes=axes)} for rank in (1, 2)]
    return [make_delta(1, spec[0], layers), {}, make_delta(2, spec[1], layers), make_delta(3, spec[1], layers)]


def products(base, x):
    """A weight for each family."""
    for path in FAMILIES:
        x = jnp.tanh(jnp.matmul(x, base["families"][path]))
    return x


def experts(base, x):
    """Tokens in groups, each with an expert of its own; the last experts are not adapted."""
    sizes = jnp.array([2, 3])
    for path in (*EXPERTS, "plain"):
        x = jnp.tanh(jax.lax.ragged_dot(x, base["experts"][path], sizes))
    return x


@functools.cache
def adapted_experts():
    small, large = ({f"experts/{path}$": recipe(rank) for path, recipe in EXPERTS.items()} for rank in (1, 2))
    return [make_delta(1, small, experts), {}, make_delta(2, large, experts), make_delta(3, small, experts)]


@functools.cache
def families():
    small, large = ({f"families/{path}$": recipe(rank) for path, recipe in FAMILIES.items()} for rank in (1, 2))
    return [make_delta(1, small, products), {}, make_delta(2, large, products), make_delta(3, small, products)]


MEMBERS = {
    "LoRA": (fn, low_rank),
    "DoRA, Full, blocks": (fn, other_kinds),
    "scan": (layers, scanned),
    "families": (products, families),
    "experts": (experts, adapted_experts),
}


def each(function, deltas, ids, x=X):
    """One example at a time."""
    adapted = jax.jit(lora.adapt(function))
    return jnp.stack([adapted(BASE, deltas[i], row) for i, row in zip(ids, x)])


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("name", MEMBERS)
def test_each_example_has_its_own_adapter(name, grouped):
    function, deltas = MEMBERS[name][0], MEMBERS[name][1]()
    stacked = lora.stack(deltas, base=BASE)
    routed = lora.route(jax.jit(lora.adapt(function)), grouped=grouped)
    chex.assert_trees_all_close(routed(BASE, stacked, IDS, X), outputs(name), rtol=1e-5, atol=1e-5)


@functools.cache
def outputs(name):
    function, deltas = MEMBERS[name]
    return each(function, deltas(), IDS)


CHOSEN = [0, 2, 2, 0, 0, 2, 0]


@functools.cache
def gradients(name):
    """Those of the members that CHOSEN names, one example at a time."""
    function, deltas = MEMBERS[name]
    train, frozen = lora.partition(lora.stack(deltas(), base=BASE))

    def loss(train):
        members = [jax.tree.map(lambda leaf, i=i: leaf[i], lora.join(train, frozen)) for i in range(4)]
        return jnp.sum(jnp.square(each(function, members, CHOSEN)))

    return jax.jit(jax.grad(loss))(train)


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_reach_the_members_that_were_chosen(name, grouped):
    function, deltas = MEMBERS[name][0], MEMBERS[name][1]()
    train, frozen = lora.partition(lora.stack(deltas, base=BASE))
    routed = lora.route(lora.adapt(function), grouped=grouped)

    def loss(train):
        return jnp.sum(jnp.square(routed(BASE, lora.join(train, frozen), CHOSEN, X)))

    result = jax.jit(jax.grad(loss))(train)
    chex.assert_trees_all_close(result, gradients(name), rtol=1e-4, atol=1e-4)
    assert any(np.asarray(leaf[0]).any() for leaf in jax.tree.leaves(result))
    assert not any(np.asarray(leaf[3]).any() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("ids", [[0], [0] * (BATCH + 1)], ids=len)
def test_the_batch_has_as_many_examples_as_ids(ids, grouped):
    routed = lora.route(lora.adapt(fn), grouped=grouped)
    with pytest.raises(ValueError, match=f"adapter_ids has {len(ids)} entries; the batch has {BATCH} examples"):
        routed(BASE, lora.stack(low_rank()), ids, X)


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
def test_an_id_that_is_no_member(grouped):
    for deltas in (low_rank(), other_kinds()):
        stacked = lora.stack(iter(deltas), base=BASE)
        routed = lora.route(lora.adapt(fn), grouped=grouped)
        for ids, bad in (([0, 4, 1, 1, 1, 1, 1], r"adapter_ids\[1\] is 4"), ([0] * 6 + [-1], r"\[6\] is -1")):
            with pytest.raises(ValueError, match=rf"{bad}; the stack has 4 members, 0 to 3"):
                routed(BASE, stacked, jnp.array(ids), X)
        # Traced, the base answers.
        out = jax.jit(routed)(BASE, stacked, jnp.array([0, 4, -1, 2, 99, 3, -5]), X)
        chex.assert_trees_all_close(out, each(fn, deltas, [0, 1, 1, 2, 1, 3, 1]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"vector of integers.*float32\[7\]"):
        routed(BASE, stacked, jnp.zeros(7), X)


def test_grouped_products_of_bfloat16():
    """Examples are counted exactly past the 256 that bfloat16 has, and products accumulate as they are asked to."""
    count = 300
    ids = jnp.array([0] * 3 + [1] * (count - 3))
    base = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    x = normal(6, count, 1, 2).astype(jnp.bfloat16)

    def wide(base, x):
        return jnp.matmul(x, base["w"], preferred_element_type=jnp.float32)

    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, init="gaussian", axes=("in", "out"))})
    ones = {"w": dataclasses.replace(delta["w"], b=jnp.ones_like(delta["w"].b))}
    thirds = {"w": dataclasses.replace(ones["w"], b=ones["w"].b / 3)}
    plain, grouped = (lora.route(lora.adapt(wide), grouped=grouped) for grouped in (False, True))
    arguments = base, lora.stack([ones, thirds]), ids, x
    chex.assert_trees_all_close(grouped(*arguments), plain(*arguments), rtol=1e-2, atol=1e-2)
    products = [e for e in equations(jax.make_jaxpr(grouped)(*arguments)) if e.primitive.name == "lora_ragged_product"]
    assert [e.params["dtype"] for e in products] == [jnp.bfloat16, jnp.float32]


def test_a_batch_of_no_examples():
    for grouped in (False, True):
        routed = lora.route(lora.adapt(fn), grouped=grouped)
        assert routed(BASE, lora.stack(low_rank()), [], X[:0]).shape == (0, LENGTH, 8)


def test_a_model_of_batches_says_how_to_route_it():
    base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 5, 4))
    model = lambda base, x: jnp.einsum("bld,dk->blk", x, base["w"])  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2)}, model, x)
    stacked = lora.stack([{}, delta])
    with pytest.raises(Exception) as raised:
        lora.route(lora.adapt(model))(base, stacked, [0, 1], x)
    assert any("on one example, without the batch axis" in note for note in raised.value.__notes__)
    one = lora.route(lora.adapt(lambda base, x: model(base, x[None])[0]))
    np.testing.assert_allclose(one(base, stacked, [0, 1], x), jax.jit(model)(base, x), rtol=1e-5)


def test_axes_are_those_of_vmap():
    def two(base, tokens, scale, extra, *, factor):
        return {"y": jnp.matmul(tokens["x"], base["w"]) * scale, "sum": jnp.sum(extra) * factor}

    deltas = [{"w": low_rank()[0]["w"]}, {"w": low_rank()[2]["w"]}]
    args = ({"x": jnp.moveaxis(X, 0, 1)}, jnp.arange(7.0), jnp.ones(3))
    ids, adapted = [0, 1, 1, 0, 1, 0, 0], lora.adapt(two)
    expected = jnp.stack(
        [adapted(BASE, deltas[i], {"x": X[n]}, args[1][n], args[2], factor=2.0)["y"] for n, i in enumerate(ids)], axis=1
    )
    for grouped in (False, True):
        routed = lora.route(adapted, in_axes=({"x": 1}, 0, None), out_axes={"y": 1, "sum": None}, grouped=grouped)
        out = routed(BASE, lora.stack(deltas), ids, *args, factor=2.0)
        chex.assert_trees_all_close(out["y"], expected, rtol=1e-5, atol=1e-5)
        assert float(out["sum"]) == 6.0


def test_dropout_keys_are_of_examples_not_of_their_order():
    delta = make_delta(1, {"^w$": lora.LoRA(2, dropout=0.5)})
    stacked, ids, key = lora.stack([{}, delta]), jnp.array([1, 0, 1, 1, 0, 0, 1]), jax.random.key(5)
    same = jnp.broadcast_to(X[:1], X.shape)
    plain, grouped = (
        lora.route(lora.adapt(fn), grouped=grouped)(BASE, stacked, ids, same, dropout_key=key)
        for grouped in (False, True)
    )
    chex.assert_trees_all_close(plain, grouped, rtol=1e-5, atol=1e-5)
    assert not np.allclose(plain[0], plain[2]) and np.allclose(plain[1], plain[4])


def test_a_batch_sharded_over_explicit_axes():
    mesh = jax.make_mesh((BATCH,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:BATCH])
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["d"], []))
    function, (one, two) = (lambda base, x: jnp.matmul(x, base["w"])), ({"w": delta["w"]} for delta in low_rank()[::2])
    base, stacked = {"w": BASE["w"]}, lora.stack([one, two, {}])
    ids, adapted = jnp.array([0, 1, 1, 2, 0, 0, 1]), lora.adapt(function)
    expected = lora.route(adapted)(base, stacked, ids, X)
    arguments = *jax.device_put((base, stacked), whole), *jax.device_put((ids, X), rows)
    with jax.set_mesh(mesh):
        out = jax.jit(lora.route(adapted))(*arguments)
        with pytest.raises(ValueError, match=r"does not support a batch that is sharded over devices.*'d'"):
            jax.jit(lora.route(adapted, grouped=True))(*arguments)
    assert out.sharding.is_equivalent_to(rows, out.ndim)
    chex.assert_trees_all_close(np.asarray(out), np.asarray(expected), rtol=1e-5, atol=1e-5)


def test_losses_by_example_and_keys_by_example():
    """What is routed needs no dropout_key, and PRNG keys among its arguments are examples' own, in their order."""
    adapted, (one, *_) = lora.adapt(fn), low_rank()

    def loss(base, delta, x, key):
        return jnp.sum(adapted(base, delta, x)) + jax.random.uniform(key)

    stacked, ids, keys = lora.stack([one, {}]), jnp.array([1, 0, 1, 0, 0, 1, 1]), jax.random.split(jax.random.key(0), 7)
    plain, grouped = (lora.route(loss, grouped=grouped)(BASE, stacked, ids, X, keys) for grouped in (False, True))
    chex.assert_trees_all_close(plain, grouped, rtol=1e-5, atol=1e-5)


def test_products_with_the_base_are_those_of_the_whole_batch():
    stacked = lora.stack(other_kinds(), base=BASE)
    shapes = {tuple(sorted(BASE[path].shape)) for path in ("w", "head")}
    for grouped in (False, True):
        jaxpr = jax.make_jaxpr(lora.route(lora.adapt(fn), grouped=grouped))(BASE, stacked, jnp.array(IDS), X)
        products = [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
        with_base = [e for e in products if any(tuple(sorted(v.aval.shape)) in shapes for v in e.invars)]
        of_batch = [e for e in with_base if any(v.aval.shape[:1] == (BATCH,) for v in e.invars)]
        # x·W and h·head; DoRA's norms are of members.
        assert len(of_batch) == 2 and all(not e.params["dimension_numbers"][1][0] for e in of_batch)
        for equation in equations(jaxpr):
            for variable in equation.outvars:
                assert not any(tuple(sorted((BATCH, *shape))) == tuple(sorted(variable.aval.shape)) for shape in shapes)


@pytest.mark.parametrize("name", ["LoRA", "scan"])
def test_grouped_factors_are_not_copied(name):
    function, deltas = MEMBERS[name][0], MEMBERS[name][1]()
    stacked = lora.stack(deltas)

    def trace(grouped):
        routed = lora.route(lora.adapt(function), grouped=grouped)
        jaxpr = jax.make_jaxpr(lambda ids: routed(BASE, stacked, ids, X))(jnp.array(IDS))
        shapes = {v.aval.shape for e in equations(jaxpr) for v in e.outvars}
        of_batch = [shape for shape in shapes if shape[:1] == (BATCH,) and LENGTH not in shape]
        copies = [shape for shape in of_batch if set(shape[1:]) & {2, 3}]  # the ranks
        return {e.primitive.name for e in equations(jaxpr)}, copies

    plain, copies = trace(grouped=False)
    assert "lora_ragged_product" not in plain and copies
    grouped, copies = trace(grouped=True)
    assert "lora_ragged_product" in grouped and not copies


def test_swapping_compiles_nothing_again():
    traces = []

    def counted(base, x):
        traces.append(None)
        return fn(base, x)

    one, _, two, three = low_rank()
    stacked = lora.stack([two], members=3, rank=4)
    compiled = jax.jit(lora.route(lora.adapt(counted)))
    ids = jnp.array([0, 1, 2, 0, 1, 2, 0])
    for deltas in ([two, {}, {}], [two, one, {}], [two, one, three], [two, {}, three]):
        for slot, delta in enumerate(deltas):
            stacked = lora.swap(stacked, slot, delta)
        chex.assert_trees_all_close(compiled(BASE, stacked, ids, X), each(fn, deltas, ids), rtol=1e-5, atol=1e-5)
    # One program, or none: JAX drops the oldest when all functions of a process together have too many.
    assert len(traces) == 1 and compiled._cache_size() <= 1


@pytest.mark.parametrize("name", MEMBERS)
def test_unstacked_members_are_what_was_stacked(name):
    deltas = MEMBERS[name][1]()
    stacked = lora.stack(deltas, members=6, rank=5, base=BASE)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(stacked)} == {6}
    chex.assert_trees_all_equal(lora.unstack(stacked, deltas), deltas)
    shapes = [jax.eval_shape(lambda delta=delta: delta) for delta in deltas]
    chex.assert_trees_all_equal(lora.unstack(stacked, shapes), deltas)


def test_what_does_not_stack():
    one, _, two, _ = low_rank()
    dora = make_delta(1, {"^w$": lora.DoRA(1)})
    blocks = make_delta(1, {"^w$": lora.LoRA(1, blocks=2)})
    half = make_delta(1, {"^w$": lora.LoRA(1, dtype=jnp.bfloat16)})
    for deltas, message in (
        ([one, dora], "'w': DoRA and LoRA adapters cannot be stacked"),
        ([one, blocks], r"'w': adapters with different static fields .*blocks=\(True, True\).* and .*blocks=\(True,\)"),
        ([one, half], r"'w': leaves .* bfloat16\[1, 4\] and float32\[1, 4\]"),
        ([dora, {}], "'w': The identity of DoRA depends on the weight: pass base="),
        ([{}, {}], "all deltas are empty"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.stack(deltas)
    with pytest.raises(ValueError, match=r"members=1\): got 2 deltas"):
        lora.stack([one, two], members=1)
    with pytest.raises(ValueError, match="'w': an adapter has rank 3; the stack has rank 2"):
        lora.stack([one, two], rank=2)
    stacked = lora.stack([one, {}])
    for slot, delta, message in (
        (2, one, r"slot=2\): the stack has 2 members, 0 to 1"),
        (1, two, "'head' is not in the stack.*'w'"),
        (1, {"w": two["w"]}, "'w': an adapter has rank 3; the stack has rank 1"),
        (1, dora, "DoRA and LoRA"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.swap(stacked, slot, delta)
    with pytest.raises(ValueError, match="3 deltas; the stack has 2 members"):
        lora.unstack(stacked, [one, {}, {}])
    with pytest.raises(ValueError, match="'head' is not in the stack"):
        lora.unstack(stacked, [two])
    with pytest.raises(ValueError, match=r"member 0 has shape \(3, 4\); the stack has \(1, 4\)"):
        lora.unstack(stacked, [{"w": two["w"]}])
    with pytest.raises(ValueError, match="'w': DoRA and LoRA adapters cannot be stacked"):
        lora.unstack(stacked, [dora])
    with pytest.raises(ValueError, match="'w' is not in the base; nearest: 'W'"):
        lora.stack([dora, {}], base={"W": BASE["w"]})
    with pytest.raises(TypeError, match=r"in_axes to be an int, None, or a tuple.*; got dict"):
        lora.route(lora.adapt(fn), in_axes={"x": 0})
    with pytest.raises(ValueError, match="Not a stack"):
        lora.route(lora.adapt(fn))(BASE, one, IDS, X)


# Training: members differ in seed, rank, path, learning rate and data.

RATES = [0.05, 0.02, 0.1, 0.01]
Y = normal(4, 4, BATCH, LENGTH, 8)


def loss(base, delta, batch, key):
    x, y = batch
    out = lora.adapt(fn)(base, delta, x, dropout_key=key)
    return jnp.sum(jnp.square(out - y)), jnp.float32(out.size)


def transform(lr):
    # The norm is of the decayed weights too, so that what stands at paths that a member lacks must not decay.
    decay = optax.add_decayed_weights(0.5)
    return optax.chain(decay, optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-lr))


@functools.cache
def starts():
    specs = (
        {"^w$": lora.LoRA(1, dropout=0.3), "bias": lora.Full()},
        {"^w$": lora.LoRA(3, alpha=5), "head": lora.DoRA(2)},
        {"head": lora.DoRA(1), "bias": lora.Full()},
        {"^w$": lora.LoRA(2)},
    )
    return [lora.init(jax.random.key(seed), BASE, spec, fn, X) for seed, spec in enumerate(specs)]


def batches(member, step):
    order = np.random.default_rng([member, step]).permutation(BATCH - 1)
    return X[order], Y[member][order]


KEYS = jax.random.split(jax.random.key(9), 4)


@functools.cache
def separate(steps):
    """Each member trained by itself, and its losses by step."""
    ends, seen = [], []
    for member, delta in enumerate(starts()):
        tx = transform(RATES[member])
        step = lora.train_step(loss, tx, accumulate=2)
        state, history = lora.TrainState.create(BASE, delta, tx, KEYS[member]), []
        for number in range(steps):
            state, metrics = step(state, batches(member, number))
            history.append(float(metrics["loss"]))
        ends.append(state.delta)
        seen.append(history)
    return ends, np.array(seen)


def together(step, states, steps, first=0):
    history = []
    for number in range(first, first + steps):
        batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(batches(member, number) for member in range(4)))
        states, metrics = step(states, batch)
        history.append(np.asarray(metrics["loss"]))
    return states, np.array(history).T


@functools.cache
def many():
    traces = []

    def counted(*args):
        traces.append(None)
        return loss(*args)

    return lora.train_many(counted, transform, accumulate=2), traces


def first_states():
    return lora.TrainStates.create(BASE, starts(), transform, KEYS, {"lr": RATES})


def test_trained_together_is_trained_apart():
    step, traces = many()
    states, history = together(step, first_states(), 4)
    ends, expected = separate(4)
    np.testing.assert_allclose(history, expected, rtol=1e-5)
    chex.assert_trees_all_close(lora.unstack(states.delta, starts()), ends, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1
    # What a member lacks has not moved: it still changes nothing.
    stacked = lora.stack(starts(), base=BASE)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf: leaf[3], tree["bias"]) for tree in (states.delta, stacked)))


def test_stopped_members_stay_bit_for_bit():
    step, traces = many()
    states, _ = together(step, first_states(), 2)
    states = dataclasses.replace(states, active=jnp.array([True, False, True, False]))
    trained_fields = lambda states: (states.delta, states.opt_state, states.step, jax.random.key_data(states.key))  # noqa: E731
    before = jax.tree.map(np.asarray, trained_fields(states))
    states, _ = together(step, states, 2, first=2)
    ends, _ = separate(4)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(trained_fields(states)), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[1, 3]], old[[1, 3]])
    assert states.step.tolist() == [4, 2, 4, 2]
    deltas = lora.unstack(states.delta, starts())
    for member in (0, 2):
        chex.assert_trees_all_close(deltas[member], ends[member], rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


def test_one_batch_and_one_transform_for_all():
    tx = transform(0.05)
    deltas = low_rank()[:3:2]
    states = lora.TrainStates.create(BASE, deltas, tx, list(KEYS[:2]))
    states, metrics = lora.train_many(loss, tx, batch_axes=None)(states, (X, Y[0]))
    step = lora.train_step(loss, tx)
    for member, delta in enumerate(deltas):
        state, expected = step(lora.TrainState.create(BASE, delta, tx, KEYS[member]), (X, Y[0]))
        chex.assert_trees_all_close(lora.unstack(states.delta, deltas)[member], state.delta, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][member], expected["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("axes", [0, (None, 1)], ids=["axis 0", "another axis"])
def test_members_in_parts_are_members_at_once(axes):
    tx, deltas = transform(0.05), low_rank()[:3]
    batch = (jnp.stack([X] * 3), Y[:3]) if axes == 0 else (X, jnp.moveaxis(Y[:3], 0, 1))
    ends = []
    for at_once in (None, 2):
        states = lora.TrainStates.create(BASE, deltas, tx, list(KEYS[:3]))
        ends.append(lora.train_many(loss, tx, batch_axes=axes, at_once=at_once)(states, batch))
    chex.assert_trees_all_close(ends[0][0].delta, ends[1][0].delta, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(ends[0][1], ends[1][1], rtol=1e-5)


def test_a_number_of_members_at_once():
    with pytest.raises(ValueError, match=r"train_many\(at_once=0\): .* positive integer"):
        lora.train_many(loss, transform(0.05), at_once=0)


def test_the_base_is_neither_batched_nor_donated():
    states = first_states()
    step = lora.train_many(loss, transform, batch_axes=None)
    jaxpr = jax.make_jaxpr(step)(states, (X, Y[0]))
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert not [e for e in products if any(v.aval.shape in ((4, 4, 6), (4, 6, 4)) for v in e.invars)]
    assert [e for e in products if any(v.aval.shape == (4, 6) for v in e.invars)]
    delta = starts()[0]
    after, _ = step(states, (X, Y[0]))
    assert after.base["w"] is BASE["w"] and not BASE["w"].is_deleted()
    assert states.delta["w"].a.is_deleted() and not delta["w"].a.is_deleted()


def test_as_many_keys_and_values_as_members():
    for keys, rates, message in (
        (KEYS[:3], RATES, "got 4 deltas and 3 keys"),
        (KEYS, RATES[:1], "got 4 deltas and 1 lr"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.TrainStates.create(BASE, starts(), transform, keys, {"lr": rates})
    with pytest.raises(ValueError, match=r"multiple of 4"):
        lora.train_many(loss, transform, accumulate=4, batch_axes=None)(first_states(), (X, Y[0]))
    for keys, rates, message in ((KEYS[0], RATES, "keys to be a vector"), (KEYS, 0.1, "lr to be a vector")):
        with pytest.raises(ValueError, match=message):
            lora.TrainStates.create(BASE, starts(), transform, keys, {"lr": rates})
    with pytest.raises(ValueError, match="Got hyperparameters lr, but tx is an Optax transform"):
        lora.TrainStates.create(BASE, starts(), transform(0.1), KEYS, {"lr": RATES})
    with pytest.raises(ValueError, match="Got hyperparameters lr, but tx is an Optax transform"):
        lora.train_many(loss, transform(0.1), batch_axes=None)(first_states(), (X, Y[0]))
    with pytest.raises(ValueError, match="states have 4 members; the batch has 3"):
        lora.train_many(loss, transform, batch_axes=(None, 0))(first_states(), (X, Y[:3]))
    with pytest.raises(ValueError, match="accumulate=0"):
        lora.train_many(loss, transform, accumulate=0)


def test_members_skip_report_and_keep_what_they_are_given():
    def with_aux(*args):
        return loss(*args), {"seen": args[2][1].sum()}

    step = lora.train_many(with_aux, transform, has_aux=True, donate=False, skip_nonfinite=True)
    states = first_states()
    batch = (jnp.stack([X] * 4), Y[:4].at[2].set(jnp.nan))
    for _ in range(2):  # not donated: the same states again
        after, metrics = step(states, batch)
    assert metrics["skipped"].tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(metrics["aux"]["seen"], batch[1].sum(tuple(range(1, batch[1].ndim))), rtol=1e-5)
    before, ends = (lora.unstack(tree.delta, starts()) for tree in (states, after))
    chex.assert_trees_all_equal(ends[2], before[2])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(ends[1]), jax.tree.leaves(before[1])))
    assert after.step.tolist() == [1, 1, 1, 1]


def test_states_that_a_step_consumed_and_fields_that_are_none():
    step, _ = many()
    states = first_states()
    together(step, states, 1)
    with pytest.raises(RuntimeError, match="donated to an earlier step"):
        together(step, states, 1)
    with pytest.raises(TypeError, match=r"TrainStates.replace: no field 'hypers'; nearest: 'hyper'"):
        states.replace(hypers={})
    with pytest.raises(ValueError, match=r"TrainStates.create: this Optax transform .*value_fn"):
        lora.TrainStates.create(BASE, low_rank()[:2], optax.lbfgs(), KEYS[:2])
    with pytest.raises(TypeError, match=r"expected a TrainStates as state; got dict"):
        step({}, None)


def test_a_compiled_step_is_called_like_the_step():
    step, _ = many()
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), batches(0, 0))
    shapes = jax.eval_shape(lambda *args: args, first_states(), batch)
    compiled = step.lower(*shapes).compile()
    (states, losses), (expected, expected_losses) = (together(each, first_states(), 2) for each in (compiled, step))
    np.testing.assert_array_equal(losses, expected_losses)
    chex.assert_trees_all_equal(states, expected)
    with pytest.raises(TypeError, match=r"^batch: the compiled step was lowered for the structure"):
        compiled(states, list(shapes[1]))


def test_routed_functions_are_compiled_ahead_of_time():
    stacked, ids = lora.stack(low_rank()), jnp.array(IDS)
    for grouped in (False, True):
        routed = lora.route(lora.adapt(fn), grouped=grouped)
        compiled = jax.jit(routed).lower(BASE, stacked, ids, X).compile()
        chex.assert_trees_all_close(compiled(BASE, stacked, ids, X), routed(BASE, stacked, ids, X), rtol=1e-5)
