"""partition(), join(), masks and the one-tree optimizer."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.throwaway import PickedRecipe

import lora_jax as lora


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["v"]


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (4, 6)), "v": jax.random.normal(getkey(), (6, 3)), "count": jnp.int32(3)}


@pytest.fixture
def delta(base, getkey):
    spec = {"^w$": lora.LoRA(2, alpha=4, dropout=0.1), "^v$": PickedRecipe(("in", "out"))}
    return lora.init(getkey(), base, spec, fn, jnp.ones((2, 4)))


def test_partition_and_join(delta):
    train, frozen = lora.partition(delta)
    assert train["w"].scale is None and frozen["w"].a is None
    assert train["v"].picked is None, "integers never train"
    chex.assert_trees_all_equal(lora.join(train, frozen), delta)
    assert jax.tree.structure(lora.join(train, frozen)) == jax.tree.structure(delta)
    with pytest.raises(ValueError, match="both halves"):
        lora.join(train, delta)
    with pytest.raises(ValueError, match="'w'"):
        lora.join(train, {"v": frozen["v"]})


def test_mask(base, delta):
    mask = lora.trainable_mask({"base": base, "delta": delta})
    assert mask["base"] == {"w": False, "v": False, "count": False}
    assert (mask["delta"]["w"].a, mask["delta"]["w"].scale, mask["delta"]["v"].picked) == (True, False, False)
    state = optax.masked(optax.adam(1e-3), lora.trainable_mask).init(delta)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trained_size(delta)


def trained_size(delta):
    return sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0]))


def test_one_tree_style(base, delta, getkey):
    x = jax.random.normal(getkey(), (5, 4))
    tx = lora.optimizer(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0, momentum=0.9)))
    tree = {"base": base, "delta": delta}
    state = tx.init(tree)
    # State bytes: one float32 slot for each trained element, nothing else.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == 4 * trained_size(delta)

    adapted = lora.adapt(fn)
    loss = lambda tree: 1e3 * jnp.sum(adapted(tree["base"], tree["delta"], x) ** 2)  # noqa: E731
    gradients = jax.grad(loss, allow_int=True)(tree)
    updates, state = tx.update(gradients, state, tree)
    moved = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(moved["base"], base)
    chex.assert_trees_all_equal(lora.partition(moved["delta"])[1], lora.partition(delta)[1])
    assert (moved["delta"]["w"].b != delta["w"].b).any()
    # The clip measured the trainable gradients alone: their update has exactly the norm that it allows.
    train = lora.partition(updates["delta"])[0]
    np.testing.assert_allclose(optax.tree.norm(train), 1e-3, rtol=1e-4)

    # The same numbers as in the two-tree style.
    part, frozen = lora.partition(delta)
    two = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0, momentum=0.9))
    grads = jax.grad(lambda part: loss({"base": base, "delta": lora.join(part, frozen)}))(part)
    expected, _ = two.update(grads, two.init(part), part)
    chex.assert_trees_all_close(train, expected, rtol=1e-5)


def test_optimizer_needs_params(base, delta):
    tx = lora.optimizer(optax.sgd(0.1))
    tree = {"base": base, "delta": delta}
    with pytest.raises(ValueError, match="needs params"):
        tx.update(tree, tx.init(tree))


def test_optimizer_passes_extra_arguments(base, delta, lenient):
    tree = {"delta": delta}
    tx = lora.optimizer(optax.contrib.reduce_on_plateau())
    _, state = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree, value=jnp.float32(1.0))
    assert state is not None


def test_optimizer_gives_the_frozen_leaves(base, delta):
    seen = {}

    def update(updates, state, params=None, *, frozen, **extra):
        seen.update(frozen)
        return updates, state

    tx = lora.optimizer(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update))
    tree = {"base": base, "delta": delta}
    tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    chex.assert_trees_all_equal(seen["delta"], lora.partition(delta)[1])
    assert not jax.tree.leaves(seen["base"])


# Groups of leaves.

LAYERS = 3
SPEC = {
    "attention": lora.DoRA(2, alpha=4, axes=("batch", "in", "out", "out")),
    "mlp": lora.LoRA(2, axes=("batch", "in", "out")),
    "keys": lora.IA3(axes=("in", "out", "out")),
    "values": lora.AdaLoRA(2, axes=("batch", "in", "out")),
    "random": lora.VeRA(4, axes=("in", "out")),
    "": lora.Full(),
}


@pytest.fixture(scope="module")
def train():
    """One adapter of each kind, with layers and heads, as the half that trains."""
    shapes = {
        "attention/kernel": (LAYERS, 6, 2, 4),
        "mlp/kernel": (LAYERS, 6, 5),
        "keys/kernel": (6, 2, 4),
        "values/kernel": (LAYERS, 6, 5),
        "random/kernel": (6, 5),
        "norm/scale": (LAYERS, 6),
        "norm/bias": (LAYERS, 6),
        "offset": (6,),
        "classifier": (6, 2),
    }
    base = {path: jnp.ones(shape) for path, shape in shapes.items()}
    return lora.partition(lora.init(jax.random.key(0), base, SPEC))[0]


def by_leaf(tree):
    return {
        "/".join(str(getattr(key, "key", getattr(key, "name", ""))) for key in keys): leaf
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


VECTORS = {
    "attention/kernel/magnitude",
    "keys/kernel/gain",
    "values/kernel/values",
    "random/kernel/d",
    "random/kernel/g",
    "norm/scale/value",
    "norm/bias/value",
    "offset/value",
}


def test_decay_mask(train):
    mask = by_leaf(lora.optim.decay_mask(train))
    assert {path for path, decays in mask.items() if not decays} == VECTORS
    assert {"attention/kernel/a", "values/kernel/b", "classifier/value"} <= mask.keys() - VECTORS
    assert lora.optim.decay_mask({"base": {"w": jnp.ones((2, 2))}}) == {"base": {"w": False}}


def test_decay_in_adamw(train, lenient):
    tx = optax.adamw(0.1, weight_decay=0.5, mask=lora.optim.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, train)
    updates = by_leaf(jax.jit(lambda train: tx.update(zeros, tx.init(train), train)[0])(train))
    for path, leaf in by_leaf(train).items():
        expected = np.zeros_like(leaf) if path in VECTORS else -0.05 * leaf
        np.testing.assert_allclose(updates[path], expected, rtol=1e-6, err_msg=path)


def test_lora_plus(train):
    tx = optax.chain(optax.sgd(0.5), lora.optim.lora_plus(16.0))
    ones = jax.tree.map(jnp.ones_like, train)
    updates, _ = jax.jit(lambda train: tx.update(ones, tx.init(train), train))(train)
    for path, update in by_leaf(updates).items():
        fast = path in VECTORS or path.endswith("/b")
        assert (update == (-8.0 if fast else -0.5)).all(), path


def test_lora_plus_is_two_learning_rates(lenient):
    """As with optimizers of their own for a and b, weight decay and schedule included."""
    recipe = lora.LoRA(2, axes=("in", "out"), init="gaussian")
    train, _ = lora.partition(lora.init(jax.random.key(0), {"w": jnp.ones((4, 5))}, {"w": recipe}))
    schedule = optax.linear_schedule(0.1, 0.02, 4)
    names = lora.optim.labels(train, lambda path, leaf, adapter: path[-1])
    rates = {"a": schedule, "b": lambda step: 5.0 * schedule(step)}
    apart = optax.multi_transform({name: optax.adamw(rate, weight_decay=0.3) for name, rate in rates.items()}, names)
    ours = optax.chain(optax.adamw(schedule, weight_decay=0.3), lora.optim.lora_plus(5.0))
    one, other = train, train
    states = apart.init(one), ours.init(other)
    for number in range(4):
        gradients = jax.tree.map(lambda x, n=number: jnp.sin(x * 10 + n), one)
        updates, first = apart.update(gradients, states[0], one)
        more, second = ours.update(gradients, states[1], other)
        one, other, states = optax.apply_updates(one, updates), optax.apply_updates(other, more), (first, second)
    chex.assert_trees_all_close(one, other, rtol=1e-5)


def test_lora_plus_with_an_injected_ratio(train, lenient):
    tx = optax.inject_hyperparams(lora.optim.lora_plus)(ratio=4.0)
    state = tx.init(train)
    state.hyperparams["ratio"] = jnp.float32(3.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, train), state, train)
    assert (updates["mlp/kernel"].b == 3.0).all() and (updates["mlp/kernel"].a == 1.0).all()


def test_lora_plus_needs_a_factor_b(train):
    with pytest.raises(ValueError, match="no LoRA or AdaLoRA adapter has a trainable factor b"):
        lora.optim.lora_plus().init({"classifier": train["classifier"]})


def test_rates_by_path(train):
    transforms = {
        r"/magnitude$": optax.sgd(4.0),
        "attention|mlp": optax.sgd(2.0, momentum=0.9),
        "^norm": optax.set_to_zero(),
        "": optax.sgd(1.0),
    }
    tx = lora.optim.by_path(transforms)
    state = tx.init(train)
    ones = jax.tree.map(jnp.ones_like, train)
    updates, state = jax.jit(tx.update)(ones, state, train)
    for path, update in by_leaf(updates).items():
        rate = 4 if path.endswith("magnitude") else 0 if "norm" in path else 2 if path[:3] in ("att", "mlp") else 1
        assert (update == -rate).all(), path
    momenta = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(momenta) == sum(getattr(train[f"{x}/kernel"], y).size for x in ("attention", "mlp") for y in "ab")
    # The same in the one-tree style.
    whole = lora.optimizer(tx)
    tree = {"base": jnp.ones(3), "delta": train}
    with pytest.raises(ValueError, match=r"'\^norm' matches no leaf; nearest: 'delta/norm"):
        whole.init(tree)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("", "atention"), "'atention' matches no leaf; nearest: 'attention/kernel/"),
        (("kernel", "mlp/kernel", ""), "'mlp/kernel' is fully shadowed"),
        (("kernel", "norm"), "the leaf 'classifier/value' matches none of 'kernel', 'norm'"),
        (("(",), "not a regular expression"),
    ],
)
def test_patterns_that_cannot_be(train, patterns, message):
    with pytest.raises(ValueError, match=message):
        lora.optim.by_path({pattern: optax.sgd(1.0) for pattern in patterns}).init(train)


# Riemannian preconditioning.


def pair(a, b, recipe=None):
    recipe = recipe or lora.LoRA(a.shape[-2], alpha=3, axes=("batch", "in", "out"))
    node = lora.init(jax.random.key(0), {"w": jnp.ones((a.shape[0], a.shape[-1], b.shape[-1]))}, {"w": recipe})["w"]
    return lora.partition({"w": dataclasses.replace(node, a=a, b=b)})


def slope(train, frozen):
    """The gradient of a loss of ΔW alone."""
    loss = lambda train: jnp.sum(jnp.sin(lora.join(train, frozen)["w"].merge(jnp.zeros((2, 6, 5)))))  # noqa: E731
    return jax.grad(loss)(train)


@pytest.fixture
def factors(getkey):
    return jax.random.normal(getkey(), (2, 3, 6)), jax.random.normal(getkey(), (2, 3, 5))


def test_preconditioned_gradients_are_the_papers(factors):
    train, frozen = pair(*factors)
    gradients = slope(train, frozen)
    tx = lora.optim.scale_by_riemannian(damping=0.1)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(train), train)
    for layer in range(2):
        a, b, g_a, g_b = (np.asarray(x[layer], np.float64) for x in (*factors, gradients["w"].a, gradients["w"].b))
        np.testing.assert_allclose(updates["w"].a[layer], np.linalg.solve(b @ b.T + 0.1 * np.eye(3), g_a), rtol=1e-3)
        np.testing.assert_allclose(updates["w"].b[layer], np.linalg.solve(a @ a.T + 0.1 * np.eye(3), g_b), rtol=1e-3)


def test_the_step_does_not_depend_on_the_factorisation(factors, getkey):
    """Under (a, b) -> (G a, G⁻ᵀ b), to first order in the rate."""
    a, b = factors
    g = jnp.eye(3)[None] + 0.4 * jax.random.normal(getkey(), (2, 3, 3))
    other = jnp.matmul(g, a, precision="highest"), jnp.linalg.solve(g.mT, b)
    tx = lora.optim.scale_by_riemannian(damping=1e-7)

    def step(a, b):
        train, frozen = pair(a, b)
        updates, _ = tx.update(slope(train, frozen), tx.init(train), train)
        return jnp.matmul(updates["w"].a.mT, b, precision="highest") + jnp.matmul(
            a.mT, updates["w"].b, precision="highest"
        )

    np.testing.assert_allclose(step(a, b), step(*other), rtol=2e-3, atol=2e-3)
    plain = [slope(*pair(x, y))["w"] for x, y in ((a, b), other)]
    moves = [g.a.mT @ y + x.mT @ g.b for g, (x, y) in zip(plain, ((a, b), other))]
    assert np.abs(moves[0] - moves[1]).max() > 0.1, "plain gradients do depend on it"


def test_padded_and_singular_factors_stay_finite(factors):
    a, b = (x.at[:, 2].set(0.0) for x in factors)  # a padded rank
    train, frozen = pair(a, b.at[0].set(0.0))  # and a b at its start
    tx = lora.optim.scale_by_riemannian()
    updates, _ = tx.update(slope(train, frozen), tx.init(train), train)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
    assert (updates["w"].a[:, 2] == 0).all() and (updates["w"].b[:, 2] == 0).all()
    equal = jnp.broadcast_to(1e3 * factors[0][:, :1], factors[0].shape)  # three rows that are one
    updates, _ = tx.update(slope(*pair(equal, factors[1])), optax.EmptyState(), pair(equal, factors[1])[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_blocks_and_other_adapters(train):
    recipe = lora.LoRA(2, blocks=(True, False, True), axes=("in", "out"), init="gaussian")
    blocks, _ = lora.partition(lora.init(jax.random.key(0), {"w": jnp.ones((6, 9))}, {"w": recipe}))
    both = {**train, **blocks}
    tx = lora.optim.scale_by_riemannian(damping=0.5)
    ones = jax.tree.map(jnp.ones_like, both)
    updates, _ = tx.update(ones, optax.EmptyState(), both)
    unchanged = lambda path, leaf: by_leaf(updates)[path] is by_leaf(ones)[path]  # noqa: E731
    changed = {path for path, leaf in by_leaf(both).items() if not unchanged(path, leaf)}
    assert changed == {f"{x}/{y}" for x in ("attention/kernel", "mlp/kernel", "w") for y in "ab"}
    a = np.asarray(blocks["w"].a, np.float64)
    expected = np.linalg.solve(a @ a.swapaxes(1, 2) + 0.5 * np.eye(2), np.ones((2, 2, 3)))
    np.testing.assert_allclose(updates["w"].b, expected, rtol=1e-4)


def test_a_frozen_factor_is_given(factors):
    train, frozen = pair(*factors, lora.LoRAFA(3, alpha=3, axes=("batch", "in", "out")))
    gradients = slope(train, frozen)
    tx = lora.optim.scale_by_riemannian(damping=0.1)
    updates, _ = tx.update(gradients, tx.init(train), train, frozen=frozen)
    both, _ = pair(*factors)
    expected, _ = tx.update({"w": dataclasses.replace(both["w"], b=gradients["w"].b)}, tx.init(both), both)
    np.testing.assert_array_equal(updates["w"].b, expected["w"].b)
    assert updates["w"].a is None
    with pytest.raises(ValueError, match=r"\['w'\] trains only b; pass frozen="):
        tx.update(gradients, tx.init(train), train)
    one_tree = lora.optimizer(tx)
    tree = {"delta": lora.join(train, frozen)}
    tree_updates, _ = one_tree.update({"delta": lora.join(gradients, frozen)}, one_tree.init(tree), tree)
    np.testing.assert_array_equal(tree_updates["delta"]["w"].b, updates["w"].b)


def test_preconditioning_that_cannot_be(train):
    with pytest.raises(ValueError, match="damping=0"):
        lora.optim.scale_by_riemannian(0)
    tx = lora.optim.scale_by_riemannian()
    with pytest.raises(ValueError, match="expected a low-rank pair"):
        tx.init({"classifier": train["classifier"]})
    with pytest.raises(ValueError, match="needs params"):
        tx.update(train, tx.init(train))


def test_all_of_it_in_one_training_step(lenient):
    """Clipping, preconditioning, Adam, decay, LoRA+ and another group for the head; the state is a plain pytree."""
    base = {"w": jnp.ones((4, 4)), "classifier": jnp.ones((4, 2))}
    fn = lambda base, x: jnp.tanh(x @ base["w"]) @ base["classifier"]  # noqa: E731
    x = jax.random.normal(jax.random.key(1), (8, 4))
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2), "classifier": lora.Full()}, fn, x)
    adapted = lora.adapt(fn)
    adapters = optax.chain(
        optax.clip_by_global_norm(1.0),
        lora.optim.scale_by_riemannian(),
        optax.adamw(optax.linear_schedule(0.05, 0.0, 10), weight_decay=0.01, mask=lora.optim.decay_mask),
        lora.optim.lora_plus(4.0),
    )
    tx = lora.optim.by_path({"^w": adapters, "^classifier": optax.sgd(0.1)})
    step = lora.train_step(lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - 0.5) ** 2), tx)
    state, losses = lora.TrainState.create(base, delta, tx, jax.random.key(2)), []
    for _ in range(4):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    leaves, treedef = jax.tree.flatten(state.opt_state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = dataclasses.replace(state, opt_state=treedef.unflatten([jnp.array(np.asarray(leaf)) for leaf in leaves]))
    expected = step(jax.tree.map(jnp.copy, state), x)[1]["loss"]
    assert step(again, x)[1]["loss"] == expected


def test_a_step_tells_the_transform_what_is_frozen(lenient):
    base, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRAFA(2)}, fn, x)
    adapted, tx = lora.adapt(fn), optax.chain(lora.optim.scale_by_riemannian(), optax.sgd(0.1))
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    step = lora.train_step(lambda base, delta, x, key: jnp.mean(adapted(base, delta, x)), tx)
    state, _ = step(state, x)
    assert np.asarray(state.delta["w"].b).any()
