"""train_step(): accumulation, token weights, devices, donation, metrics."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.training import check_finite


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["head"]


adapted = lora.adapt(fn)


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (4, 6)), "head": jax.random.normal(getkey(), (6, 2))}


@pytest.fixture
def batch(getkey):
    mask = (jax.random.uniform(getkey(), (16,)) > 0.4).astype(jnp.float32)
    return jax.random.normal(getkey(), (16, 4)), jax.random.normal(getkey(), (16, 2)), mask


def weighted(base, delta, batch, key):
    x, y, mask = batch
    return jnp.sum(mask * jnp.sum((adapted(base, delta, x) - y) ** 2, axis=-1)), jnp.sum(mask)


def plain(base, delta, batch, key):
    x, y, _ = batch
    return jnp.mean((adapted(base, delta, x) - y) ** 2)


def run(loss, base, batch, steps=3, put=lambda state: state, **options):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2, alpha=4), "head": lora.Full()}, fn, batch[0])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))
    state = put(lora.TrainState.create(base, delta, tx, jax.random.key(1)))
    step = lora.train_step(loss, tx, **options)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        check_finite(metrics)
        history.append({name: float(metrics[name]) for name in ("loss", "grad_norm", "weight")})
    return jax.tree.map(np.asarray, state.delta), history


@pytest.mark.parametrize("loss", [plain, weighted])
@pytest.mark.parametrize("options", [{"accumulate": 2}, {"pmap": True}, {"pmap": True, "accumulate": 2}])
def test_every_form_gives_the_same_numbers(loss, options, base, batch):
    delta, history = run(loss, base, batch)
    other_delta, other_history = run(loss, base, batch, **options)
    chex.assert_trees_all_close(other_delta, delta, rtol=1e-5, atol=1e-6)
    for one, other in zip(history, other_history):
        np.testing.assert_allclose([one["loss"], one["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=1e-5)


def test_the_loss_is_the_sum_divided_by_the_weight(base, batch):
    _, history = run(weighted, base, batch, steps=1, accumulate=4)
    total, weight = weighted(base, {}, batch, None)
    np.testing.assert_allclose(history[0]["loss"], total / weight, rtol=1e-6)
    assert history[0]["weight"] == float(weight)


def test_sharded_over_data(base, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    expected = run(plain, base, batch, accumulate=2)
    got = run(
        plain,
        base,
        jax.device_put(batch, rows),
        put=lambda state: jax.device_put(state, whole),
        accumulate=2,
    )
    chex.assert_trees_all_close(got[0], expected[0], rtol=1e-5, atol=1e-6)


def test_buffers_of_delta_and_optimizer_are_donated_and_the_base_is_not(base, batch):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2)}, fn, batch[0])
    tx = optax.adam(1e-3)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    with jax.numpy_dtype_promotion("standard"):
        after, _ = lora.train_step(plain, tx)(state, batch)
    assert state.delta["w"].a.is_deleted() and state.opt_state[0].mu["w"].a.is_deleted()
    assert not base["w"].is_deleted() and after.base["w"] is base["w"]
    assert not delta["w"].a.is_deleted(), "create() copies, so the caller's delta lives on"
    assert int(after.step) == 1 and (jax.random.key_data(after.key) != jax.random.key_data(jax.random.key(1))).any()


def test_one_compilation(base, batch):
    traces = []

    def loss(base, delta, batch, key):
        traces.append(None)
        return plain(base, delta, batch, key)

    for pmap in (False, True):
        traces.clear()
        run(loss, base, batch, steps=3, pmap=pmap)
        assert len(traces) == 1


def test_lowered_for_shapes_it_is_the_step_that_runs(base, batch):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2)}, fn, batch[0])
    state = lora.TrainState.create(base, delta, optax.sgd(0.1, momentum=0.9), jax.random.key(1))
    step = lora.train_step(plain, optax.sgd(0.1, momentum=0.9))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
    lowered = step.lower(*shapes)
    assert lowered.as_text() == step.lower(state, batch).as_text()
    memory = lowered.compile().memory_analysis()
    donated = (state.delta["w"].a, state.delta["w"].b, state.opt_state)
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(donated))
    assert not state.delta["w"].a.is_deleted()


def test_each_step_and_microbatch_has_its_own_key(base, batch):
    def noise(base, delta, batch, key):
        return plain(base, delta, batch, key) * 0 + jax.random.uniform(key)

    _, history = run(noise, base, batch, steps=3, accumulate=2)
    assert len({entry["loss"] for entry in history}) == 3


def test_gradients_that_are_not_finite_are_named(base, batch):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2), "head": lora.Full()}, fn, batch[0])
    tx = optax.sgd(0.1)

    def broken(base, delta, batch, key):
        return plain(base, delta, batch, key) + jnp.sum(jnp.sqrt(delta["w"].b))

    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    _, metrics = lora.train_step(broken, tx)(state, batch)
    assert {path: int(count) for path, count in metrics["nonfinite"].items()} == {"head": 0, "w": 12}
    with pytest.raises(FloatingPointError, match=r"w \(12 elements\)"):
        check_finite(metrics)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        check_finite({"loss": jnp.float32(jnp.nan), "nonfinite": {"w": 0}})
    many = {"loss": jnp.ones(3), "nonfinite": {"head": jnp.array([0, 0, 0]), "w": jnp.array([0, 5, 768])}}
    with pytest.raises(FloatingPointError, match=r": w \(member 1: 5 elements, member 2: 768 elements\)"):
        check_finite(many)
    with pytest.raises(FloatingPointError, match=r"loss is \[ 1. inf\]"):
        check_finite({"loss": jnp.array([1, jnp.inf]), "nonfinite": {"w": jnp.zeros(2, int)}})


def test_refusals(base, batch):
    with pytest.raises(ValueError, match="positive integer"):
        lora.train_step(plain, optax.sgd(0.1), accumulate=0)
    with pytest.raises(ValueError, match=r"\(16, 4\).*multiple of 3"):
        run(plain, base, batch, accumulate=3)
    with pytest.raises(ValueError, match=r"multiple of 24 .* 8 devices"):
        run(plain, base, batch, accumulate=3, pmap=True)
    with pytest.raises(ValueError, match=r"loss of shape \(16, 2\)"):
        run(lambda base, delta, batch, key: adapted(base, delta, batch[0]), base, batch)


def test_a_base_with_leaves_that_are_no_arrays(getkey):
    model = eqx.nn.MLP(4, 2, 8, 1, key=getkey())
    apply = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    x = jax.random.normal(getkey(), (16, 4))
    delta = lora.init(getkey(), model, {"weight": lora.LoRA(2)}, apply, x)
    whole = lora.adapt(apply)
    tx = optax.sgd(0.1)
    for options in ({}, {"pmap": True}):
        state = lora.TrainState.create(model, delta, tx, getkey())
        step = lora.train_step(lambda base, delta, x, key: jnp.mean(whole(base, delta, x) ** 2), tx, **options)
        state, first = step(state, x)
        _, second = step(state, x)
        assert float(second["loss"]) < float(first["loss"])
    tree = {"base": model, "delta": delta}
    one_tree = lora.optimizer(tx)
    updates, _ = one_tree.update(jax.tree.map(lambda leaf: leaf, tree), one_tree.init(tree), tree)
    assert updates["base"].activation is None


def test_the_one_tree_optimizer_in_a_step(base, batch):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2)}, fn, batch[0])
    ends = []
    for tx in (optax.sgd(0.1), lora.optimizer(optax.sgd(0.1))):
        state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
        ends.append(lora.train_step(plain, tx)(state, batch)[0].delta)
    chex.assert_trees_all_equal(*ends)


def test_a_batch_of_weight_zero_changes_nothing(base, batch):
    empty = (*batch[:2], jnp.zeros(16))
    before, _ = run(weighted, base, batch, steps=0)
    after, history = run(weighted, base, empty, steps=1)
    chex.assert_trees_all_equal(after, before)
    assert history[0]["loss"] == 0 and history[0]["weight"] == 0


def test_transforms_that_keep_parameters_or_read_the_loss(base, batch, lenient):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2)}, fn, batch[0])
    for tx in (optax.contrib.dog(1e-2), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())):
        state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
        state, metrics = lora.train_step(plain, tx)(state, batch)
        check_finite(metrics)


def test_bfloat16_factors_accumulate_in_float32(base, batch):
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2, dtype=jnp.bfloat16)}, fn, batch[0])
    train, frozen = lora.partition(delta)
    delta = lora.join(jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1, leaf.dtype), train), frozen)
    tx = optax.sgd(0.1)
    norms = []
    for accumulate in (1, 16):
        state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
        norms.append(float(lora.train_step(plain, tx, accumulate=accumulate)(state, batch)[1]["grad_norm"]))
    np.testing.assert_allclose(norms[1], norms[0], rtol=2e-2)


def start(base, batch, tx, spec=None):
    delta = lora.init(jax.random.key(0), base, spec or {"^w$": lora.LoRA(2, alpha=4)}, fn, batch[0])
    return lora.TrainState.create(base, delta, tx, jax.random.key(1))


def with_aux(base, delta, batch, key):
    out = adapted(base, delta, batch[0])
    return weighted(base, delta, batch, key), {"mean": out.mean(), "out": out, "count": len(batch[0])}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"pmap": True}, {"pmap": True, "accumulate": 2}])
def test_auxiliary_outputs(options, base, batch):
    tx = optax.sgd(0.1)
    _, expected = lora.train_step(weighted, tx)(start(base, batch, tx), batch)
    _, metrics = lora.train_step(with_aux, tx, has_aux=True, **options)(start(base, batch, tx), batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    aux = metrics["aux"]
    lead = (8,) * ("pmap" in options) + (2,) * ("accumulate" in options)
    assert aux["mean"].shape == lead and aux["out"].shape == (*lead, 16 // max(1, int(np.prod(lead))), 2)
    np.testing.assert_allclose(aux["mean"].mean(), adapted(base, {}, batch[0]).mean(), rtol=1e-5)
    assert int(aux["count"].sum()) == 16


def test_batch_statistics_go_back_into_the_base_and_nothing_compiles_again(getkey):
    net = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)))
    apply_fn, base = lora.nnx.functional(net)
    x = jax.random.normal(getkey(), (8, 4)) + 3
    delta = lora.init(getkey(), base, {"kernel": lora.LoRA(2)}, apply_fn, x, mutable=("batch_stats",))
    whole, traces = lora.adapt(apply_fn), []

    def loss(base, delta, x, key):
        traces.append(None)
        out, changed = whole(base, delta, x, mutable=("batch_stats",))
        return jnp.mean((out - 1) ** 2), changed

    tx = optax.sgd(0.1)
    state, step = lora.TrainState.create(base, delta, tx, getkey()), lora.train_step(loss, tx, has_aux=True)
    for _ in range(200):
        state, metrics = step(state, x)
        state = state.replace(base=lora.nnx.updated(state.base, metrics["aux"]))
    assert len(traces) == 1
    hidden = lora.adapt(lambda base, x: x @ base["layers"][0]["kernel"] + base["layers"][0]["bias"][None])
    expected = hidden(base, state.delta, x).mean(0)
    np.testing.assert_allclose(state.base["layers"][1]["mean"], expected, rtol=0.2, atol=0.05)
    net = lora.nnx.updated(net, lora.merge(state.base, state.delta))
    np.testing.assert_array_equal(net.layers[1].mean[...], state.base["layers"][1]["mean"])


def bad_losses():
    one = jnp.float32(1)
    yield jnp.ones(3), False, r"loss_fn \(returns, .*test_training.py:\d+\) returned a loss of shape \(3,\)"
    yield None, False, "returned None as the loss"
    yield (one, one, one), False, "returned a tuple of 3"
    yield (one, {"accuracy": one}), False, "returned dict as the weight.*has_aux=True"
    yield (one, jnp.ones(2)), False, r"weight of shape \(2,\)"
    yield jnp.int32(3), False, "loss of dtype int32"
    yield jnp.complex64(3), False, "loss of dtype complex64"
    yield (one, jnp.complex64(3)), False, "weight of dtype complex64"
    yield [one], False, "returned list as the loss"
    yield one, True, r"returned an array of shape \(\); with has_aux=True a step expects \(loss, aux\)"
    yield (one, one, {}), True, "returned a tuple of 3; with has_aux=True"
    yield ((one, one, one), {}), True, "returned a tuple of 3; expected a scalar loss"
    yield (one, {"name": "text"}), True, "auxiliary output 'name' is str"


@pytest.mark.parametrize(("out", "has_aux", "message"), list(bad_losses()))
def test_what_is_no_loss(out, has_aux, message, base, batch):
    def returns(base, delta, batch, key):
        return jax.tree.map(lambda leaf: leaf, out)

    for options in ({}, {"accumulate": 2}):
        step = lora.train_step(returns, optax.sgd(0.1), has_aux=has_aux, **options)
        with pytest.raises((TypeError, ValueError), match=message):
            step(start(base, batch, optax.sgd(0.1)), batch)


@pytest.mark.parametrize("weight", [-1.0, jnp.nan, jnp.inf])
def test_an_invalid_weight_is_counted(weight, base, batch):
    def loss(base, delta, batch, key):
        total, _ = weighted(base, delta, batch, key)
        return total, jnp.where(batch[0].sum() > 0, weight, 1.0)

    x = jnp.abs(batch[0]) * jnp.where(jnp.arange(16) % 4 == 1, 1.0, -1.0)[:, None]
    tx = optax.sgd(0.1)
    _, metrics = lora.train_step(loss, tx, accumulate=4)(start(base, batch, tx), (x, *batch[1:]))
    assert int(metrics["invalid_weights"]) == 1
    with pytest.raises(FloatingPointError, match=r"weight that loss_fn returned is negative .*\(1 microbatches\)"):
        check_finite(metrics)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"pmap": True}, {"donate": False}])
def test_a_step_that_is_not_finite_is_skipped(options, base, batch):
    tx = optax.adam(0.1)
    step = lora.train_step(weighted, tx, skip_nonfinite=True, **options)
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = step(start(base, batch, tx), batch)
        assert int(metrics["skipped"]) == 0
        delta, opt_state, key = jax.tree.map(np.asarray, (state.delta, state.opt_state, jax.random.key_data(state.key)))
        state, metrics = step(state, (batch[0].at[3].set(jnp.nan), *batch[1:]))
        assert int(metrics["skipped"]) == 1 and int(metrics["nonfinite"]["w"]) > 0
        chex.assert_trees_all_equal((state.delta, state.opt_state), (delta, opt_state))
        assert int(state.step) == 2 and (jax.random.key_data(state.key) != key).any()
        state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 0 and (state.delta["w"].b != delta["w"].b).any()


def test_a_skipped_step_on_a_mesh(base, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    tx = optax.sgd(0.1)
    state = jax.device_put(start(base, batch, tx), whole)
    before = jax.tree.map(np.asarray, state.delta)
    bad = jax.device_put((batch[0].at[3].set(jnp.nan), *batch[1:]), rows)
    state, metrics = lora.train_step(plain, tx, skip_nonfinite=True)(state, bad)
    assert int(metrics["skipped"]) == 1
    chex.assert_trees_all_equal(state.delta, before)


@pytest.mark.parametrize("pmap", [False, True])
def test_a_state_that_a_step_consumed(pmap, base, batch):
    tx = optax.sgd(0.1)
    step = lora.train_step(plain, tx, pmap=pmap)
    state, _ = step(start(base, batch, tx), batch)  # what pmap consumes is the replicated state that it returned
    step(state, batch)
    with pytest.raises(RuntimeError, match=r"donated to an earlier step.*donate=False"):
        step(state, batch)
    state, step = start(base, batch, tx), lora.train_step(plain, tx, pmap=pmap, donate=False)
    first, _ = step(state, batch)
    second, _ = step(state, batch)
    chex.assert_trees_all_equal(first.delta, second.delta)


@pytest.mark.parametrize(
    "options",
    [{}, {"donate": False}, {"pmap": True}, {"pmap": True, "donate": False}, {"accumulate": 2, "has_aux": True}],
    ids=str,
)
def test_a_compiled_step_is_called_like_the_step(options, base, batch):
    loss = (lambda *args: (plain(*args), {"ones": jnp.ones(3)})) if options.get("has_aux") else plain
    tx = optax.sgd(0.1, momentum=0.9)
    step = lora.train_step(loss, tx, **options)
    compiled = step.lower(start(base, batch, tx), batch).compile()
    assert isinstance(compiled.memory_analysis().temp_size_in_bytes, int)
    assert compiled.cost_analysis()["flops"] > 0
    expected, state = start(base, batch, tx), start(base, batch, tx)
    for _ in range(2):
        expected, metrics = step(expected, batch)
        consumed, (state, others) = state, compiled(state=state, batch=batch)
    chex.assert_trees_all_equal((state.delta, state.step, others), (expected.delta, expected.step, metrics))
    if options.get("donate", True):
        with pytest.raises(RuntimeError, match="donated to an earlier step"):
            compiled(consumed, batch)


def test_a_compiled_step_lowered_for_shapes(base, batch):
    tx = optax.sgd(0.1, momentum=0.9)
    step = lora.train_step(plain, tx, donate=False)
    state = start(base, batch, tx)
    compiled = step.lower(*jax.eval_shape(lambda *args: args, state, batch)).compile()
    chex.assert_trees_all_equal(compiled(state, batch)[0].delta, step(state, batch)[0].delta)
    with pytest.raises(TypeError, match=r"state.delta: the compiled step was lowered for the structure .*; got "):
        compiled(start(base, batch, tx, {"head": lora.LoRA(2)}), batch)
    with pytest.raises(TypeError, match=r"^batch: the compiled step was lowered for the structure"):
        compiled(state, list(batch))
    with pytest.raises(TypeError, match="leaves of its base that are not arrays differ"):
        step.lower(state.replace(base={**base, "mode": "a"}), batch).compile()(
            state.replace(base={**base, "mode": "b"}), batch
        )


def test_a_compiled_step_on_a_mesh_takes_the_states_that_it_returns(base, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    base = jax.device_put(base, NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    tx = optax.sgd(0.1, momentum=0.9)
    step, state = lora.train_step(plain, tx), start(base, batch, tx)
    compiled = step.lower(state, batch).compile()
    for _ in range(3):
        state, metrics = compiled(state, batch)
    assert int(state.step) == 3 and jnp.isfinite(metrics["loss"])


def test_a_compiled_step_notices_dropout_without_a_key(base, batch):
    tx = optax.sgd(0.1)
    state = start(base, batch, tx, {"^w$": lora.LoRA(2, dropout=0.25)})
    compiled = lora.train_step(plain, tx, donate=False).lower(state, batch).compile()
    with pytest.warns(UserWarning, match="1 adapters have dropout"):
        compiled(state, batch)


def test_adapted_functions_are_compiled_ahead_of_time(base, batch):
    x = batch[0]
    delta = lora.init(jax.random.key(0), base, {"^w$": lora.LoRA(2)}, fn, x)
    compiled = jax.jit(adapted).lower(*jax.eval_shape(lambda *args: args, base, delta, x)).compile()
    chex.assert_trees_all_close(compiled(base, delta, x), adapted(base, delta, x), rtol=1e-6)


def test_dropout_without_a_key_is_noticed_once(base, batch):
    tx = optax.sgd(0.1)
    state = start(base, batch, tx, {"^w$": lora.LoRA(2, dropout=0.25)})
    step = lora.train_step(plain, tx, donate=False)
    with pytest.warns(UserWarning, match=r"1 adapters have dropout \(0.25 at 'w'\).*dropout_key=key"):
        step(state, batch)
    step(state, batch)  # warnings are errors here

    def loss(base, delta, batch, key):
        x, y, _ = batch
        return jnp.mean((adapted(base, delta, x, dropout_key=key) - y) ** 2)

    lora.train_step(loss, tx, donate=False, accumulate=2)(state, batch)
    adapted(base, state.delta, batch[0])  # evaluation
    lora.train_step(plain, tx)(start(base, batch, tx), batch)  # no dropout


def test_fields_are_replaced_by_name(base, batch):
    state = start(base, batch, optax.sgd(0.1))
    other = state.replace(step=jnp.int32(7), base=None)
    assert int(other.step) == 7 and other.base is None and other.delta is state.delta
    with pytest.raises(TypeError, match=r"TrainState.replace: no field 'optstate'; nearest: 'opt_state'"):
        state.replace(optstate=None)


def test_a_transform_that_is_none(base, batch):
    for tx, message in ((optax.adam, r"got adam; call it: adam\(learning_rate\)"), (1e-3, "got float")):
        with pytest.raises(TypeError, match=message):
            lora.train_step(plain, tx)
        with pytest.raises(TypeError, match=message):
            start(base, batch, tx)
        with pytest.raises(TypeError, match=message):
            lora.optimizer(tx)
    with pytest.raises(TypeError, match="expected a TrainState as state; got dict"):
        lora.train_step(plain, optax.sgd(0.1))(base, batch)
