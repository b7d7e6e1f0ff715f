"""host_offloaded(): optimizer state in host memory gives the numbers of state on the device, in every form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.jaxpr_checks import equations
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.optim import host_offloaded

LARGE = 20  # elements


def adam(**options):
    return host_offloaded(optax.adam(1e-2, **options), min_size=LARGE)


def kinds(state):
    """The memory kinds of the leaves that are large, and of the others."""
    leaves = jax.tree.leaves(state)
    return tuple(
        {leaf.sharding.memory_kind for leaf in leaves if (leaf.size >= LARGE) == large} for large in (True, False)
    )


@pytest.fixture
def params(getkey):
    shapes = {"a": (4, 6), "b": (5, 8), "bias": (3,)}
    return {name: jax.random.normal(getkey(), shape) for name, shape in shapes.items()}


def trained(tx, params, steps=3, jit=True):
    def step(params, state):
        gradients = jax.tree.map(lambda x: x + jnp.sin(x), params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    params, state = jax.tree.map(jnp.copy, params), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


TRANSFORMS = {
    "adam": lambda off: off(optax.adam(1e-2)),
    "momentum": lambda off: off(optax.sgd(1e-2, momentum=0.9, nesterov=True)),
    "in a chain": lambda off: optax.chain(
        optax.clip_by_global_norm(1.0), off(optax.scale_by_adam()), optax.scale(-1e-2)
    ),
    "around a chain": lambda off: off(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.clip_by_global_norm(0.1))
    ),
    "hyperparameters": lambda off: optax.inject_hyperparams(lambda rate: off(optax.adam(rate)))(rate=1e-2),
    "groups": lambda off: lora.optim.by_path({"a": off(optax.adam(1e-2)), "": off(optax.sgd(0.1, momentum=0.9))}),
    "around MultiSteps": lambda off: off(optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()),
    "in MultiSteps": lambda off: optax.MultiSteps(off(optax.adam(1e-2)), 2).gradient_transformation(),
    "skipping": lambda off: off(optax.apply_if_finite(optax.adam(1e-2), 3)),
    "twice": lambda off: off(off(optax.adam(1e-2))),
    "moments in bfloat16": lambda off: off(optax.adam(1e-2, mu_dtype=jnp.bfloat16)),
    "a constant output": lambda off: off(optax.set_to_zero()),
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_are_those_of_the_transform(name, jit, params, lenient):
    make = TRANSFORMS[name]
    want, want_state = trained(make(lambda tx: tx), params, jit=jit)
    got, state = trained(make(lambda tx: host_offloaded(tx, min_size=LARGE)), params, jit=jit)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    chex.assert_trees_all_close(jax.device_put(state, jax.memory.Space.Device), want_state, rtol=1e-6)
    large, small = kinds(state)
    multi_steps = {"device"} if name == "in MultiSteps" else set()  # the sums of gradients are its own
    assert large - multi_steps <= {"pinned_host"} and small <= {"device"}


def test_what_is_large(params, lenient):
    state = host_offloaded(optax.adam(1e-2)).init({"w": jnp.ones((400, 250)), "v": jnp.ones((400, 249))})
    memory_kinds = {leaf.shape: leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    assert memory_kinds == {(400, 250): "pinned_host", (400, 249): "device", (): "device"}
    _, state = trained(host_offloaded(optax.adam(1e-2), min_size=0), params)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"pinned_host"}


def test_other_arguments_reach_the_transform(params):
    def update(updates, state, params=None, *, value, schedule, **extra):
        return jax.tree.map(lambda g: g * value * schedule(state["count"]), updates), state

    def init(params):
        return {"count": jnp.float32(2), "large": jnp.ones(LARGE)}

    tx = host_offloaded(optax.GradientTransformationExtraArgs(init, update), min_size=LARGE)
    updates, state = tx.update(params, tx.init(params), value=3.0, schedule=lambda count: count + 1.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: 9.0 * g, params), rtol=1e-6)
    assert state["large"].sharding.memory_kind == "pinned_host"


def test_state_from_the_device_goes_to_the_host(params, lenient):
    tx, plain = adam(), optax.adam(1e-2)
    updates, state = jax.jit(tx.update)(params, plain.init(params), params)
    chex.assert_trees_all_close(updates, plain.update(params, plain.init(params), params)[0], rtol=1e-6)
    assert kinds(state) == ({"pinned_host"}, {"device"})


def order_of_transfers(tx, params):
    """In the traced update, which large leaf goes to which memory, as it is written; and after how many others."""
    state = tx.init(params)
    traced = jax.make_jaxpr(tx.update)(params, state, params)
    moves, waits = [], 0
    for equation in equations(traced):
        if equation.primitive.name == "device_put":
            moves.append((equation.params["devices"][0].name, equation.outvars[0].aval.shape))
        waits += equation.primitive.name == "optimization_barrier"
    return moves, waits


def test_leaf_by_leaf(lenient):
    params = {f"w{number}": jnp.ones((4, 5 + number)) for number in range(4)}
    moment = [[("Device", (4, 5 + number)), ("Host", (4, 5 + number))] for number in range(4)]
    expected = [move for moves in moment for move in moves * 2]  # mu, then nu
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2), optax.add_decayed_weights(0.1))
    for tx in (adam(), host_offloaded(clipped, min_size=LARGE)):
        assert order_of_transfers(tx, params) == (expected, 6)  # all but the first two wait
    # A norm of the updates needs all moments; those that are computed leave all the same.
    moves, _ = order_of_transfers(
        host_offloaded(optax.chain(optax.adam(1e-2), optax.clip_by_global_norm(1.0)), min_size=LARGE), params
    )
    assert moves == expected


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded(axis_type, params, lenient):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))
    params = {"b": jax.device_put(params["b"], spread)}
    with jax.set_mesh(mesh):
        want, _ = trained(optax.adam(1e-2), params)
        for jit in (True, False):
            got, state = trained(adam(), params, jit=jit)
            chex.assert_trees_all_close(got, want, rtol=1e-6)
            moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
            assert len(moments) == 2
            for leaf in moments:
                assert leaf.sharding.is_equivalent_to(spread.with_memory_kind("pinned_host"), 2)


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["v"]


def loss(base, delta, x, key):
    return jnp.mean(lora.adapt(fn)(base, delta, x) ** 2)


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (8, 16)), "v": jax.random.normal(getkey(), (16, 4))}


@pytest.fixture
def delta(base):
    spec = {"w": lora.LoRA(2, init="gaussian"), "v": lora.Full()}
    return lora.init(jax.random.key(0), base, spec, fn, jnp.ones((2, 8)))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
@pytest.mark.parametrize("spread", [False, True])
def test_train_step(options, spread, base, delta, getkey, lenient):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(getkey(), (16, 8))
    if spread:
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        base, delta = jax.device_put((base, delta), NamedSharding(mesh, PartitionSpec()))

    def run(tx):
        state, step = lora.TrainState.create(base, delta, tx, jax.random.key(1)), lora.train_step(loss, tx, **options)
        for _ in range(3):
            before = state.opt_state
            state, metrics = step(state, x)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "the state is donated"
        return state, metrics

    want, want_metrics = run(optax.adam(1e-2))
    got, metrics = run(adam())
    chex.assert_trees_all_close((got.delta, metrics), (want.delta, want_metrics), rtol=1e-5)
    assert kinds(got.opt_state) == ({"pinned_host"}, {"device"})


def test_the_first_state_has_buffers_of_its_own(base, delta):
    identity = host_offloaded(
        optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, s)), min_size=0
    )
    shared = jax.device_put(lora.partition(delta)[0], jax.memory.Space.Host)
    tx = optax.GradientTransformation(lambda params: shared, identity.update)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    state, _ = lora.train_step(loss, tx)(state, jnp.ones((2, 8)))
    chex.assert_trees_all_equal(jax.device_get(shared), jax.device_get(lora.partition(delta)[0]))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state)} == {"pinned_host"}


def test_one_tree_style(base, delta, lenient):
    tree = {"base": base, "delta": delta}
    gradients = jax.tree.map(jnp.ones_like, tree)
    plain, tx = lora.optimizer(optax.adam(1e-2)), lora.optimizer(adam())
    want, _ = plain.update(gradients, plain.init(tree), tree)
    got, state = tx.update(gradients, tx.init(tree), tree)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    assert kinds(state) == ({"pinned_host"}, {"device"})


def test_pmap_is_refused(base, delta):
    tx = host_offloaded(optax.sgd(0.1, momentum=0.9), min_size=LARGE)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    with pytest.raises(ValueError, match="pmap"):
        lora.train_step(loss, tx, pmap=True)(state, jnp.ones((8, 8)))


def test_a_backend_without_pinned_memory_is_refused(params, monkeypatch):
    class Device:
        platform = "abacus"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "beads"})]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(ValueError, match="abacus devices have no memory of the kind 'pinned_host', only 'beads'"):
        adam().init(params)


def test_in_a_jitted_init(params):
    state = jax.jit(host_offloaded(optax.sgd(0.1, momentum=0.9), min_size=LARGE).init)(params)
    assert kinds(state) == ({"pinned_host"}, {"device"})
    np.testing.assert_array_equal(jax.tree.leaves(state)[0], 0.0)


def test_a_skipped_step_leaves_state_in_the_hosts_memory():
    base, x = {"w": jnp.ones((512, 512))}, jnp.ones((4, 512))
    delta = lora.init(jax.random.key(0), base, {"w": lora.Full()}, lambda p, x: x @ p["w"], x)
    adapted, tx = lora.adapt(lambda p, x: x @ p["w"]), lora.optim.host_offloaded(optax.sgd(1e-3, momentum=0.9))
    step = lora.train_step(lambda base, delta, x, key: adapted(base, delta, x).mean(), tx, skip_nonfinite=True)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    for factor in (1.0, jnp.nan):
        state, metrics = step(state, x * factor)
        assert int(metrics["skipped"]) == (factor != 1)
        assert jax.tree.leaves(state.opt_state)[0].sharding.memory_kind == "pinned_host"
    assert jnp.isfinite(state.delta["w"].value).all()
