"""AdaLoRA: its layers and its schedule against PEFT's, and what both promise beyond that."""

import dataclasses
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.optim import AllocationState

STORED = dict(np.load(pathlib.Path(__file__).parent / "fixtures/adapters/adalora.npz"))
RANK, TARGET, ALPHA = 4, 2, 6
SCHEDULE = {"steps": 20, "warmup": 4, "final": 5, "interval": 3}


def convolved(base, x):
    numbers = ("NCHW", "OIHW", "NCHW")
    y = lax.conv_general_dilated(x, base["weight"], (1, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    return y + base["bias"][None, :, None, None]


LAYERS = {
    "linear": (lambda base, x: x @ base["weight"].T + base["bias"][None], ("out", "in")),
    "conv1d_hf": (lambda base, x: x @ base["weight"] + base["bias"][None], ("in", "out")),
    "conv2d": (convolved, ("out", "in", "in", "in")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_pefts(name):
    fn, axes = LAYERS[name]
    stored = {key.removeprefix(f"{name}."): value for key, value in STORED.items() if key.startswith(f"{name}.")}
    base = {"weight": jnp.asarray(stored["weight"]), "bias": jnp.asarray(stored["bias"])}
    x = jnp.asarray(stored["x"])
    # PEFT divides alpha by rank + 1e-5.
    spec = {"weight": lora.AdaLoRA(RANK, alpha=ALPHA * RANK / (RANK + 1e-5))}
    delta = lora.init(jax.random.key(0), base, spec, fn, x)
    assert delta["weight"].axes == axes
    node = dataclasses.replace(
        delta["weight"],
        a=jnp.asarray(stored["A"]).reshape(delta["weight"].a.shape),
        values=jnp.asarray(stored["E"]).ravel(),
        b=jnp.asarray(stored["B"]).T,
    )
    adapted = lora.adapt(fn)
    np.testing.assert_allclose(adapted(base, {"weight": node}, x), stored["y"], rtol=1e-5, atol=1e-5)
    merged = lora.merge(base, {"weight": node})["weight"] - base["weight"]
    np.testing.assert_allclose(merged, stored["delta"], rtol=1e-5, atol=1e-6)
    assert lora.explain(fn, base, {"weight": node}, x).factored
    train, frozen = lora.partition({"weight": node})
    gradients = jax.grad(lambda train: jnp.sum(jnp.sin(adapted(base, lora.join(train, frozen), x))))(train)["weight"]
    expected = {"a": stored["grad_A"], "values": stored["grad_E"], "b": stored["grad_B"].T}
    for leaf, value in expected.items():
        result = getattr(gradients, leaf)
        np.testing.assert_allclose(result, value.reshape(result.shape), rtol=1e-4, atol=1e-5)


def stored_delta():
    shapes = {"one": (5, 4), "two": (4, 6), "three": (6, 7)}
    base = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    delta = lora.init(jax.random.key(0), base, {"": lora.AdaLoRA(RANK, axes=("in", "out"))})
    return {
        name: dataclasses.replace(
            node,
            a=jnp.asarray(STORED[f"allocation.{name}.A"]),
            values=jnp.asarray(STORED[f"allocation.{name}.E"]).ravel(),
            b=jnp.asarray(STORED[f"allocation.{name}.B"]).T,
        )
        for name, node in delta.items()
    }


def stored_gradients(train):
    """Of all steps: each leaf has an axis of steps before its own."""
    return {
        name: dataclasses.replace(
            node,
            a=jnp.asarray(STORED[f"allocation.{name}.grad_A"]),
            values=jnp.asarray(STORED[f"allocation.{name}.grad_E"])[..., 0],
            b=jnp.asarray(STORED[f"allocation.{name}.grad_B"]).mT,
        )
        for name, node in train.items()
    }


def trained(tx, train, gradients):
    """Values after every step, in a scan; and the last state."""

    def step(carry, gradients):
        train, state = carry
        updates, state = tx.update(gradients, state, train)
        train = optax.apply_updates(train, updates)
        return (train, state), {name: node.values for name, node in train.items()}

    (_, state), values = lax.scan(step, (train, tx.init(train)), gradients)
    return values, state


def test_every_step_of_the_allocation_is_pefts():
    train, _ = lora.partition(stored_delta())
    tx = lora.optim.allocate_ranks(optax.sgd(0.3), TARGET, **SCHEDULE)
    values, state = jax.jit(lambda train, gradients: trained(tx, train, gradients))(train, stored_gradients(train))
    assert isinstance(state, AllocationState) and int(state.step) == 20
    for name, result in values.items():
        expected = STORED[f"allocation.{name}.values"]
        np.testing.assert_array_equal(result == 0, expected == 0)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.active[name], expected[-1] != 0)
    assert sum(int(active.sum()) for active in state.active.values()) == TARGET * 3


def test_budgets_are_pefts():
    schedule = {key: SCHEDULE[key] for key in ("steps", "warmup", "final")}
    budgets = lora.optim.rank_budget(jnp.arange(20), RANK * 3, TARGET * 3, **schedule)
    np.testing.assert_array_equal(budgets, STORED["allocation.budgets"])
    assert budgets.dtype == jnp.int32
    long = lora.optim.rank_budget(jnp.arange(1000), 800, 300, steps=900, warmup=100, final=200)
    assert (np.diff(long) <= 0).all() and long[100] == 800 and long[101] < 800 and long[699] >= 300 == long[700]


def test_the_penalty_is_pefts():
    delta = stored_delta()
    np.testing.assert_allclose(lora.optim.orthogonality(delta), STORED["allocation.penalty"], rtol=1e-5)
    # Layers that are stacked count as layers; orthonormal factors cost nothing and have a gradient.
    rows = jnp.eye(3)[:2]
    node = lora.AdaLoRA(2).create(jax.random.key(0), jnp.zeros((4, 3, 3)), ("batch", "in", "out"))
    tiled = jnp.broadcast_to(rows, (4, 2, 3))
    whole = dataclasses.replace(node, a=tiled, b=tiled)
    value, gradient = jax.value_and_grad(lambda a: lora.optim.orthogonality({"w": dataclasses.replace(whole, a=a)}))(
        whole.a
    )
    assert value == 0 and (gradient == 0).all()
    half = dataclasses.replace(whole, a=whole.a.at[0].set(0.0))
    np.testing.assert_allclose(lora.optim.orthogonality({"w": half}), np.sqrt(2) / 8, rtol=1e-6)


def test_stacked_layers_share_the_budget_of_separate_ones():
    key = jax.random.key(3)
    apart = {
        str(i): lora.AdaLoRA(3).create(jax.random.fold_in(key, i), jnp.zeros((5, 4)), ("in", "out")) for i in (0, 1)
    }
    stacked = lora.AdaLoRA(3).create(key, jnp.zeros((2, 5, 4)), ("batch", "in", "out"))
    leaves = {name: jnp.stack([getattr(node, name) for node in apart.values()]) for name in ("a", "values", "b")}
    stacked = {"w": dataclasses.replace(stacked, **leaves)}
    tx = lora.optim.allocate_ranks(optax.sgd(0.1), 1, steps=6, final=2)
    parts = lora.partition(apart)[0], lora.partition(stacked)[0]
    draw = jax.random.split(jax.random.key(4), 3)
    drawn = {
        name: jax.random.normal(k, (6, 2, *getattr(apart["0"], name).shape))
        for k, name in zip(draw, ("a", "values", "b"))
    }
    gradients = (
        {
            path: dataclasses.replace(node, **{name: x[:, int(path)] for name, x in drawn.items()})
            for path, node in parts[0].items()
        },
        {"w": dataclasses.replace(parts[1]["w"], **drawn)},
    )
    (one, _), (other, _) = (jax.jit(lambda p, g: trained(tx, p, g))(part, g) for part, g in zip(parts, gradients))
    np.testing.assert_allclose(np.stack(list(one.values()), axis=1), other["w"], rtol=1e-6, atol=1e-7)
    assert np.count_nonzero(other["w"][-1]) == 2


def test_members_are_pruned_apart():
    train, _ = lora.partition(stored_delta())
    gradients = stored_gradients(train)
    tx = lora.optim.allocate_ranks(optax.sgd(0.3), TARGET, **SCHEDULE)
    both = jax.tree.map(lambda x: jnp.stack([x, -x[::-1]]), gradients)
    members = jax.tree.map(lambda x: jnp.stack([x, x]), train)
    values, _ = jax.vmap(lambda train, gradients: trained(tx, train, gradients))(members, both)
    alone, _ = trained(tx, train, jax.tree.map(lambda x: -x[::-1], gradients))
    for name, result in values.items():
        np.testing.assert_allclose(result[0], STORED[f"allocation.{name}.values"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(result[1], alone[name], rtol=1e-5, atol=1e-6)


def fn(base, x):
    return jnp.tanh(x @ base["u"]) @ base["v"] + base["c"][None]


def test_a_training_beside_other_adapters(lenient):
    base = {"u": jax.random.normal(jax.random.key(0), (6, 6)), "v": jnp.ones((6, 2)), "c": jnp.zeros(2)}
    x = jax.random.normal(jax.random.key(1), (8, 6))
    spec = {"u": lora.AdaLoRA(4, alpha=4), "v": lora.LoRA(2), "c": lora.Full()}
    delta = lora.init(jax.random.key(2), base, spec, fn, x)
    adapted = lora.adapt(fn)

    @chex.assert_max_traces(n=1)
    def loss(base, delta, x, key):
        error = adapted(base, delta, x) - jnp.sin(3 * x[:, :2])
        return jnp.mean(jnp.square(error)) + 0.1 * lora.optim.orthogonality(delta)

    tx = lora.optim.allocate_ranks(optax.adam(0.05), 1, steps=12, warmup=2, final=4, interval=2)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(3))
    step, ranks = lora.train_step(loss, tx), []
    for _ in range(12):
        state, metrics = step(state, x)
        ranks.append(int(jnp.count_nonzero(state.delta["u"].values)))
    assert ranks[:3] == [4, 4, 4] and ranks[4] < 4 and ranks[8:] == [1, 1, 1, 1]
    assert np.isfinite(metrics["loss"]) and (state.delta["v"].b != 0).all() and (state.delta["c"].value != 0).all()
    # What the others do is what the inner optimizer does with them.
    train, _ = lora.partition(delta)
    gradients = jax.tree.map(jnp.ones_like, train)
    inner = optax.adam(0.05)
    ours, _ = jax.jit(tx.update)(gradients, tx.init(train), train)
    theirs, _ = jax.jit(inner.update)(gradients, inner.init(train), train)
    chex.assert_trees_all_close(ours["v"], theirs["v"], rtol=1e-6)


def test_one_tree_style():
    delta = stored_delta()
    train, _ = lora.partition(delta)
    gradients = jax.tree.map(lambda x: x[0], stored_gradients(train))
    tree = {"base": {"w": jnp.ones(3)}, "delta": delta}
    tx = lora.optimizer(lora.optim.allocate_ranks(optax.sgd(0.3), TARGET, steps=20, warmup=0))
    state = tx.init(tree)
    assert set(state.active) == {"delta/one", "delta/two", "delta/three"}
    full = {"base": {"w": jnp.ones(3)}, "delta": lora.join(gradients, lora.partition(delta)[1])}
    updates, state = jax.jit(tx.update)(full, state, tree)
    assert (updates["base"]["w"] == 0).all() and (updates["delta"]["one"].scale == 0)


def test_blocks_scale_and_the_plain_pair():
    base = {"w": jax.random.normal(jax.random.key(1), (6, 8))}
    recipe = lora.AdaLoRA(2, alpha=3, blocks=(True, False), scaling="alpha/sqrt(r)", axes=("in", "out"))
    node = lora.init(jax.random.key(0), base, {"w": recipe})["w"]
    assert node.values.shape == (1, 2) and node.rank == 2 and node.shape() == (6, 8)
    np.testing.assert_array_equal(node.merge(base["w"]), base["w"])
    node = dataclasses.replace(node, values=jnp.array([[2.0, 0.0]]))
    expected = 3 / np.sqrt(2) * 2.0 * np.outer(node.a[0, 0], node.b[0, 0])
    np.testing.assert_allclose(node.merge(jnp.zeros((6, 8))), np.pad(expected, ((0, 0), (0, 4))), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(lora.merging.norm(node.folded()), np.linalg.norm(expected), rtol=1e-5)
    assert node.describe()["rank"] == 2


def test_padding_and_the_adapter_that_changes_nothing():
    base, x = {"w": jax.random.normal(jax.random.key(1), (6, 5))}, jnp.ones((2, 6))
    fn = lambda base, x: jnp.sin(x @ base["w"])  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {"w": lora.AdaLoRA(2, alpha=3)}, fn, x)
    node = dataclasses.replace(delta["w"], values=jnp.array([2.0, -1.0]))
    wide = node.pad_rank(4)
    assert (wide.rank, wide.a.shape, wide.b.shape) == (4, (4, 6), (4, 5))
    np.testing.assert_allclose(wide.merge(base["w"]), node.merge(base["w"]), rtol=1e-6)
    np.testing.assert_array_equal(node.identity_like(None).merge(base["w"]), base["w"])
    train, frozen = lora.partition({"w": wide})
    adapted = lora.adapt(fn)
    gradients = jax.grad(lambda train: jnp.sum(adapted(base, lora.join(train, frozen), x)))(train)["w"]
    assert all((leaf[2:] == 0).all() for leaf in jax.tree.leaves(gradients))
    with pytest.raises(ValueError, match="cannot be padded to 1"):
        node.pad_rank(1)


def test_a_saved_adapter_is_read_back(tmp_path):
    delta = stored_delta()
    lora.save(tmp_path / "adapter", delta)
    chex.assert_trees_all_equal(lora.load(tmp_path / "adapter"), delta)


def test_equal_scores_keep_to_the_budget():
    node = lora.AdaLoRA(4).create(jax.random.key(0), jnp.zeros((5, 5)), ("in", "out"))
    train, _ = lora.partition({"w": node})
    tx = lora.optim.allocate_ranks(optax.sgd(0.1), 2, steps=1)
    zeros = jax.tree.map(jnp.zeros_like, train)
    update = jax.jit(tx.update)
    _, state = update(zeros, tx.init(train), train)
    _, state = update(zeros, state, train)
    assert state.active["w"].tolist() == [False, False, True, True]
    # A state that an earlier version saved has the path 'kept/w'.
    assert "kept/w" in lora.paths.flatten(state).paths
    with pytest.raises(AttributeError, match=r"AllocationState\.kept has been renamed to active"):
        state.kept  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_rank": 2, "steps": 10, "warmup": 6, "final": 4}, "10 − 6 − 4 leaves no step"),
        ({"target_rank": 2, "steps": 10, "warmup": -1}, "leaves no step|warmup=-1"),
        ({"target_rank": 0, "steps": 10}, "target_rank=0"),
        ({"target_rank": 2, "steps": 10, "interval": 0}, "interval=0"),
        ({"target_rank": 2, "steps": 10, "beta2": 1.0}, "beta2=1.0"),
    ],
)
def test_schedules_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        lora.optim.allocate_ranks(optax.sgd(0.1), **arguments)


def test_parameters_that_cannot_be():
    tx = lora.optim.allocate_ranks(optax.sgd(0.1), 5, steps=10)
    with pytest.raises(ValueError, match=r"target_rank=5.*'one' 4"):
        tx.init(stored_delta())
    plain = lora.init(jax.random.key(0), {"w": jnp.zeros((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
    with pytest.raises(ValueError, match="expected an AdaLoRA adapter among the parameters, got LoRA"):
        tx.init(plain)
    with pytest.raises(ValueError, match="expected an AdaLoRA adapter"):
        lora.optim.orthogonality(plain)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(stored_delta(), tx)
    with pytest.raises(ValueError, match="target=9"):
        lora.optim.rank_budget(0, 8, 9, steps=10)
    with pytest.raises(TypeError, match="init"):
        lora.AdaLoRA(2, init="pissa")
    with pytest.raises(ValueError, match=r"AdaLoRA\(rank=0\)"):
        lora.AdaLoRA(0)


def test_a_schedule_without_a_final_phase_ends_at_the_target(lenient):
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 8))}, {"w": lora.AdaLoRA(6, axes=("in", "out"))})
    train, _ = lora.partition(delta)
    tx = lora.optim.allocate_ranks(optax.adam(1e-2), 2, steps=10, interval=7)
    state = tx.init(train)
    for _ in range(10):
        updates, state = tx.update(jax.tree.map(jnp.cos, train), state, train)
        train = optax.apply_updates(train, updates)
    assert int(jnp.count_nonzero(train["w"].values)) == 2
