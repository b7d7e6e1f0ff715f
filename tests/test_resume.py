"""save_state() and restore_state(): resumed training continues to the same bits."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import contrib
from quantized_bases import quantize

import lora_jax as lora

X = jax.random.normal(jax.random.key(5), (8, 64))


def fn(base, x):
    return jnp.tanh(x @ base["w"]) @ base["v"]


adapted = lora.adapt(fn)


def loss(base, delta, x, key):
    return jnp.mean((adapted(base, delta, x, dropout_key=key) - 1) ** 2)


def floats():
    keys = jax.random.split(jax.random.key(0))
    return {"w": jax.random.normal(keys[0], (64, 32)) / 8, "v": jax.random.normal(keys[1], (32, 8)) / 6}


def quantized():
    return lora.quantize(floats(), {"w": lora.NF4(axes=("in", "out"))})


def in_blocks_of_a_file():
    return quantize(quantize(floats(), {"w": lora.Q4_1(axes=("in", "out"))}), {"v": lora.Q4_K(axes=("in", "out"))})


def on_mesh():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(floats(), NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))


def start(base, tx, key, recipe=None):
    delta = lora.init(jax.random.key(1), base, {"w": recipe or lora.LoRA(2, dropout=0.1), "v": lora.Full()}, fn, X)
    if isinstance(jax.tree.leaves(base)[0].sharding, NamedSharding):
        delta = jax.device_put(delta, lora.delta_shardings(base, delta))
    return lora.TrainState.create(base, delta, tx, key)


def plain_key(state):
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)


def injected():
    return optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1)


@pytest.mark.parametrize("base", [floats, quantized, in_blocks_of_a_file, on_mesh])
@pytest.mark.parametrize(
    "make", [injected, lambda: lora.optimizer(optax.noisy_sgd(0.1, key=jax.random.key(3)))], ids=["adamw", "noisy_sgd"]
)
def test_two_steps_and_two_more_are_four(base, make, tmp_path, lenient):
    base, tx = base(), make()
    step = lora.train_step(loss, tx)
    state = start(base, tx, jax.random.key(2))
    history = []
    for number in range(4):
        if number == 2:
            lora.save_state(tmp_path / "state", state)
        state, metrics = step(state, X)
        history.append(float(metrics["loss"]))
    again = lora.restore_state(tmp_path / "state", base, tx)
    assert int(again.step) == 2 and again.base is base
    for number in range(2, 4):
        again, metrics = step(again, X)
        assert float(metrics["loss"]) == history[number]
    rest = ("delta", "opt_state", "step", "key")
    chex.assert_trees_all_equal(*(plain_key({name: getattr(end, name) for name in rest}) for end in (again, state)))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, again.opt_state, state.opt_state)
    assert all(jax.tree.leaves(same)) and again.delta["w"].a.sharding == state.delta["w"].a.sharding


@pytest.mark.parametrize(
    "key", [lambda: jax.random.PRNGKey(2), lambda: jax.random.key(2, impl="rbg")], ids=["raw", "rbg"]
)
def test_keys_of_every_kind(key, tmp_path):
    state = start(floats(), optax.sgd(0.1), key())
    lora.save_state(tmp_path / "state", state)
    again = lora.restore_state(tmp_path / "state", state.base, optax.sgd(0.1))
    assert again.key.dtype == state.key.dtype
    np.testing.assert_array_equal(jax.random.uniform(again.key), jax.random.uniform(state.key))


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.MultiSteps(optax.adam(0.1), 2),
        lambda: optax.chain(optax.clip(1.0), contrib.schedule_free_adamw(0.1)),
        lambda: lora.optim.by_path({"^v": optax.sgd(0.1, momentum=0.9), "": optax.adafactor(0.1)}),
    ],
    ids=["MultiSteps", "schedule_free", "by_path"],
)
def test_states_of_every_structure(make, tmp_path, lenient):
    tx = make()
    state = start(floats(), tx, jax.random.key(2), lora.VeRA(2))
    lora.save_state(tmp_path / "state", state)
    again = lora.restore_state(tmp_path / "state", state.base, tx)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again.opt_state, state.opt_state)


def test_the_directory_is_an_adapters_too(tmp_path):
    state = start(floats(), optax.adam(0.1), jax.random.key(2))
    for _ in range(2):  # a state that is there already is replaced
        lora.save_state(tmp_path / "state", state)
    chex.assert_trees_all_equal(lora.load(tmp_path / "state", state.base), state.delta)
    assert len(list((tmp_path / "state").iterdir())) == 2
    lora.save(tmp_path / "adapter", state.delta)
    with pytest.raises(ValueError, match=r"has an adapter but no training state; read it with lora\.load"):
        lora.restore_state(tmp_path / "adapter", state.base, optax.adam(0.1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        lora.save_state(tmp_path / "other", state)


def test_what_does_not_fit_is_named(tmp_path):
    state = start(floats(), optax.adam(0.1), jax.random.key(2))
    lora.save_state(tmp_path / "state", state)
    with pytest.raises(
        ValueError, match=r"(?s)another transform than tx.*'opt_state/0/mu/v/value': stored, float32"
    ) as e:
        lora.restore_state(tmp_path / "state", state.base, optax.sgd(0.1))
    assert "'opt_state/0/count': stored, int32[]; tx has none" in str(e.value)
    with pytest.raises(ValueError, match=r"'opt_state/0/mu/w/a': stored float32\[2, 64\]; tx has bfloat16\[2, 64\]"):
        lora.restore_state(tmp_path / "state", state.base, optax.adam(0.1, mu_dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match=r"'w'.*trained on other values"):
        lora.restore_state(tmp_path / "state", state.base | {"w": state.base["w"] + 1}, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"'v': for shape \(32, 8\), but the base lacks it"):
        lora.restore_state(tmp_path / "state", {"w": state.base["w"]}, optax.adam(0.1))
    with pytest.raises(FileNotFoundError):
        lora.restore_state(tmp_path / "nowhere", state.base, optax.adam(0.1))


def test_a_damaged_state(tmp_path):
    state = start(floats(), optax.sgd(0.1), jax.random.key(2))
    lora.save_state(tmp_path / "state", state)
    file = tmp_path / "state" / "adapter.json"
    whole = json.loads(file.read_text())
    for damage in ({"@key": {"shape": [2], "dtype": "uint32", "prng": "none"}}, {"@key": 3}, [1], {"@step": {}}):
        changed = whole["state"] | damage if isinstance(damage, dict) else damage
        file.write_text(json.dumps(whole | {"state": changed}))
        with pytest.raises(ValueError, match=r"damaged"):
            lora.restore_state(tmp_path / "state", state.base, optax.sgd(0.1))


def test_what_is_no_state(tmp_path):
    state = start(floats(), optax.sgd(0.1), jax.random.key(2))
    with pytest.raises(TypeError, match=r"got dict; lora\.save writes a delta"):
        lora.save_state(tmp_path / "state", state.delta)
    with pytest.raises(ValueError, match="'step' is not an array: got str"):
        lora.save_state(tmp_path / "state", state.replace(step="two"))
    assert not (tmp_path / "state").exists()


def test_a_state_that_a_step_consumed_is_not_saved(tmp_path):
    tx = optax.sgd(0.1)
    state = start(floats(), tx, jax.random.key(2))
    lora.train_step(loss, tx)(state, X)
    with pytest.raises(RuntimeError, match="Use the state that the step returned"):
        lora.save_state(tmp_path / "state", state)
    assert not (tmp_path / "state").exists()
