"""Where the arrays of a delta, and of a whole training state, lie on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax.sharding import state_shardings
from sharding.problem import BASE, LAYERS, OUTPUTS, RANK, SPEC, WIDTH, X, model, started, three

LAYOUT = three(2, 2, 2)
shardings = LAYOUT.weights
fn = model()
DELTA = lora.init(jax.random.key(0), BASE, SPEC, fn, X)


@pytest.fixture(scope="module")
def mesh():
    return LAYOUT.mesh()


RECIPES = {
    "LoRA": (lora.LoRA(4), {"a": (None, None, "fsdp"), "b": (None, None, "tensor"), "scale": (), "dropout": ()}),
    "blocks": (lora.LoRA(4, blocks=2), {"a": (None, None, None, "fsdp"), "b": (None, None, None, "tensor")}),
    "DoRA": (lora.DoRA(4), {"a": (None, None, "fsdp"), "magnitude": (None, "tensor")}),
    "DoRA_inputs": (lora.DoRA(4, norm_over="out"), {"magnitude": (None, "fsdp")}),
    "VeRA": (lora.VeRA(4), {"d": (None, None), "g": (None, "tensor"), "a": (None, "fsdp"), "b": (None, "tensor")}),
    "DVoRA": (lora.DVoRA(4), {"magnitude": (None, "tensor")}),
    "AdaLoRA": (lora.AdaLoRA(4), {"a": (None, None, "fsdp"), "values": (None, None), "b": (None, None, "tensor")}),
    "LoRAFA": (lora.LoRAFA(4), {"a": (None, None, "fsdp"), "b": (None, None, "tensor")}),
    "LoHa": (lora.LoHa(2), {"a1": (None, None, "fsdp"), "b2": (None, None, "tensor")}),
    "LoKr": (lora.LoKr(2), {"c": (None, None, None), "a": (None, None, None)}),
    "IA3": (lora.IA3(), {"gain": (None, "tensor")}),
    "IA3_inputs": (lora.IA3("in"), {"gain": (None, "fsdp")}),
    "Full": (lora.Full(), {"value": (None, "fsdp", "tensor")}),
    "Offset": (lora.Offset(), {"value": (None, "fsdp", "tensor")}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_arrays_lie_where_the_weight_does_along_the_axes_they_share(mesh, name):
    recipe, expected = RECIPES[name]
    delta = lora.init(jax.random.key(0), BASE, {"layers/up": recipe}, fn, X)
    placements = lora.delta_shardings(shardings(mesh), delta)
    assert jax.tree.structure(placements) == jax.tree.structure(delta)
    for field, spec in expected.items():
        assert tuple(getattr(placements["layers/up"], field).spec) == spec, field
    jax.device_put(delta, placements)  # which fits


def test_placed_bases_and_quantized_ones_say_the_same(mesh):
    expected_shardings = lora.delta_shardings(shardings(mesh), DELTA)
    placed = jax.device_put(BASE, shardings(mesh))
    small = lora.quantize(placed, {"layers": lora.NF4(8)}, fn, X)
    trees = jax.tree.map(lambda array: array.sharding, small)
    for base in (placed, small, trees):
        assert lora.delta_shardings(base, DELTA) == expected_shardings


def test_what_does_not_divide_is_whole(mesh):
    sharding = {"w": NamedSharding(mesh, P("fsdp", ("data", "tensor")))}
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, blocks=2, axes=("in", "out"))})
    placements = lora.delta_shardings(sharding, delta)["w"]
    assert placements.b.spec == P(None, None, None)  # 4 outputs in 2 blocks are 2 each, in 4 parts


def test_one_device_is_one_device():
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
    placements = lora.delta_shardings({"w": jnp.ones((8, 4))}, delta)
    assert {device for leaf in jax.tree.leaves(placements) for device in leaf.device_set} == {jax.devices()[0]}


def test_what_has_no_sharding_is_named(mesh):
    whole = NamedSharding(mesh, P())
    with pytest.raises(ValueError, match=r"no sharding for 'layers/down'; nearest: 'layers/up'"):
        lora.delta_shardings({"layers": {"up": whole}, "head": whole}, DELTA)
    with pytest.raises(ValueError, match="'head' has no sharding: got ndarray"):
        lora.delta_shardings(shardings(mesh) | {"head": np.ones((WIDTH, OUTPUTS))}, DELTA)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "clipped_adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=lora.optim.decay_mask)),
    "lora_plus": optax.chain(optax.adam(1e-3), lora.optim.lora_plus()),
    "groups": lora.optim.by_path({"^head": optax.sgd(0.1, momentum=0.9), "": optax.adam(1e-3)}),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),  # of `a` rows and columns, of `scale` nothing
    "accumulated": optax.MultiSteps(optax.chain(optax.ema(0.9), optax.sgd(0.1)), 2).gradient_transformation(),
    "rates": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "offloaded": lora.optim.host_offloaded(optax.adam(1e-3), min_size=LAYERS * RANK * WIDTH),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings_are_those_of_a_state_of_placed_arrays(mesh, lenient, name):
    tx, key = OPTIMIZERS[name], jax.random.key(1)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (BASE, DELTA, key))
    state = jax.eval_shape(functools.partial(lora.TrainState.create, tx=tx), *abstract[:2], key=abstract[2])
    expected_shardings = state_shardings(shardings(mesh), state, tx)
    base = jax.device_put(BASE, shardings(mesh))
    placements = lora.TrainState.create(base, jax.device_put(DELTA, lora.delta_shardings(base, DELTA)), tx, key)
    assert jax.tree.structure(expected_shardings) == jax.tree.structure(placements)
    for (keys, to), leaf in zip(
        jax.tree_util.tree_leaves_with_path(expected_shardings), jax.tree.leaves(placements), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim), keys
        assert leaf.sharding.memory_kind == to.memory_kind, keys


def test_state_shardings_of_quantized_bases(mesh):
    base, delta = started(form=lora.NF4(8))
    tx = optax.sgd(0.1)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    from_weights = state_shardings(shardings(mesh), state, tx)
    placed = jax.device_put(base, from_weights.base)
    for weights in (placed, from_weights.base):
        assert jax.tree.leaves(state_shardings(weights, state, tx)) == jax.tree.leaves(from_weights)
    assert placed["layers"]["up"].codes.sharding.spec == P(None, "fsdp", "tensor")


def test_state_shardings_say_what_is_missing(mesh):
    tx = optax.adam(1e-3)
    state = lora.TrainState.create(BASE, DELTA, tx, jax.random.key(1))
    with pytest.raises(ValueError, match=r"no sharding for 'other'; nearest: 'head'"):
        state_shardings(shardings(mesh), dataclasses.replace(state, base=BASE | {"other": jnp.ones(2)}), tx)
    with pytest.raises(ValueError, match="belongs to another transform"):
        state_shardings(shardings(mesh), state, optax.sgd(0.1))
