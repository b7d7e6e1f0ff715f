"""Optax transforms in train_step() and lora.optimizer(): which are served, and that frozen leaves stay."""

import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import lora_jax as lora


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["v"]


adapted = lora.adapt(fn)
X = jax.random.normal(jax.random.key(5), (8, 6))


def loss(base, delta, x, key):
    return jnp.mean((adapted(base, delta, x, dropout_key=key) - 1) ** 2)


def with_rate(module, *names):
    return {name: lambda name=name: getattr(module, name)(0.01) for name in names}


SERVED = {
    **with_rate(optax, "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan"),
    **with_rate(optax, "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "novograd"),
    **with_rate(optax, "optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "sm3", "yogi"),
    **with_rate(contrib, "acprop", "ademamix", "dadapt_adamw", "dog", "dowg", "muon", "prodigy"),
    **with_rate(contrib, "schedule_free_adamw", "schedule_free_sgd"),
    "adamw, mask": lambda: optax.adamw(0.01, weight_decay=0.1, mask=lora.optim.decay_mask),
    "cocob": contrib.cocob,
    "momo": lambda: contrib.momo(0.01),
    "momo_adam": lambda: contrib.momo_adam(0.01),
    "mechanize": lambda: contrib.mechanize(optax.adam(0.01)),
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=0),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs without a line search": lambda: optax.lbfgs(0.01, linesearch=None),
    "sam": lambda: contrib.sam(optax.sgd(0.01), optax.sgd(0.01), sync_period=2),
    "sam in a chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), contrib.sam(optax.sgd(0.01), optax.sgd(0.01))
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.01), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
    "clips": lambda: optax.chain(optax.clip(1.0), optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "decay, ema, centralize": lambda: optax.chain(
        optax.centralize(), optax.ema(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)
    ),
    "skip_not_finite": lambda: optax.MultiSteps(optax.sgd(0.1), 1, should_skip_update_fn=optax.skip_not_finite),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.01),
    "schedule": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 10)),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau()),
    "masked": lambda: optax.masked(optax.sgd(0.1), lora.optim.decay_mask),
    "partition": lambda: optax.partition(
        {"a": optax.sgd(0.1), "rest": optax.adam(0.01)},
        lambda tree: lora.optim.labels(tree, lambda path, leaf, adapter: "a" if path.endswith("/a") else "rest"),
    ),
    "by_path": lambda: lora.optim.by_path({"/a$": optax.sgd(0.1), "": contrib.sam(optax.sgd(0.1), optax.sgd(0.1))}),
}


@pytest.fixture(scope="module")
def base():
    keys = jax.random.split(jax.random.key(0))
    return {"w": jax.random.normal(keys[0], (6, 6)), "v": jax.random.normal(keys[1], (6, 3))}


@pytest.fixture(scope="module")
def delta(base):
    return lora.init(jax.random.key(1), base, {"w": lora.LoRA(2, alpha=4, dropout=0.1), "v": lora.Full()}, fn, X)


@pytest.mark.parametrize("name", SERVED)
def test_transforms_that_take_parameters_as_they_are(name, base, delta, lenient, recwarn):
    tx = SERVED[name]()
    state, step = lora.TrainState.create(base, delta, tx, jax.random.key(2)), lora.train_step(loss, tx)
    for _ in range(2):
        state, metrics = step(state, X)
    lora.training.check_finite(metrics)
    assert (state.delta["w"].b != delta["w"].b).any()
    _, frozen = lora.partition(delta)
    chex.assert_trees_all_equal(lora.partition(state.delta)[1], frozen)

    tree, one_tree = {"base": base, "delta": delta}, lora.optimizer(tx)
    opt_state = one_tree.init(tree)
    gradients = jax.tree.map(jnp.ones_like, tree)
    updates, _ = jax.eval_shape(lambda *args: one_tree.update(*args, value=1.0), gradients, opt_state, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_names():
    assert len(SERVED) >= 30 and all(callable(make) for make in SERVED.values())


REFUSED = {
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5), "AttributeError.*'fast'"),
    "lbfgs": (optax.lbfgs, "value_fn"),
    "opaque sam": (lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True), "grad_fn"),
    "line search": (lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)), "value_fn"),
    "sophia": (lambda: contrib.sophia(0.1), "obj_fn"),
    "galore": (lambda: contrib.galore(0.1), "AttributeError"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_transforms_that_need_something_else(name, base, delta, lenient, recwarn):
    make, message = REFUSED[name]
    with pytest.raises(
        ValueError, match=rf"TrainState.create: this Optax transform cannot be used.*{message}"
    ) as error:
        lora.TrainState.create(base, delta, make(), jax.random.key(2))
    assert "\n" not in str(error.value)


RECIPES = {
    name: getattr(lora, name)
    for name in lora.__all__
    if inspect.isclass(getattr(lora, name)) and lora.Recipe in getattr(lora, name).__mro__[1:]
}
# What weight decay and noise do to every leaf that they see, without the time that compiling random numbers takes.
NOISE = optax.stateless(lambda updates, params: jax.tree.map(lambda g, p: -0.1 * (g + p + 1), updates, params))


def build(recipe):
    arguments = {"rank": 2, "size": 2, "block_size": 3, "ids": (0, 2), "dropout": 0.1}
    return recipe(**{name: arguments[name] for name in inspect.signature(recipe).parameters if name in arguments})


def test_the_noise_of_optax_and_decay(base, delta, lenient):
    tx = optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adamw(0.1, weight_decay=0.5))
    state, step = lora.TrainState.create(base, delta, tx, jax.random.key(2)), lora.train_step(loss, tx)
    state, _ = step(state, X)
    chex.assert_trees_all_equal(lora.partition(state.delta)[1], lora.partition(delta)[1])


@pytest.mark.parametrize("name", RECIPES)
def test_decay_and_noise_never_change_what_is_frozen(name, lenient):
    base = {"w": jax.random.normal(jax.random.key(0), (6, 6))}
    if name == "Rows":
        looked_up, x = (lambda p, ids: p["w"][ids]), jnp.arange(4)
    else:
        looked_up, x = (lambda p, x: x @ p["w"]), X
    delta = lora.init(jax.random.key(1), base, {"w": build(RECIPES[name])}, looked_up, x)
    model = lora.adapt(looked_up)

    def loss(base, delta, x, key):
        return jnp.mean(model(base, delta, x, dropout_key=key) ** 2)

    train, frozen = lora.partition(delta)
    ends = []
    state, step = lora.TrainState.create(base, delta, NOISE, jax.random.key(2)), lora.train_step(loss, NOISE)
    for _ in range(2):
        state, _ = step(state, x)
    ends.append(state.delta)

    states = lora.TrainStates.create(base, [delta], NOISE, jax.random.split(jax.random.key(2), 1))
    states, _ = lora.train_many(loss, NOISE, batch_axes=None)(states, x)
    ends += lora.unstack(states.delta, [delta])

    tx, tree = lora.optimizer(NOISE), {"base": base, "delta": delta}
    gradients = jax.grad(lambda tree: loss(tree["base"], tree["delta"], x, None), allow_int=True)(tree)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(tree), tree)
    moved = optax.apply_updates(tree, updates)
    chex.assert_trees_all_equal(moved["base"], base)
    ends.append(moved["delta"])
    for end in ends:
        chex.assert_trees_all_equal(lora.partition(end)[1], frozen)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(lora.partition(end)[0]), jax.tree.leaves(train)))
