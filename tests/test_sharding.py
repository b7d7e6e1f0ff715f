"""Deltas on meshes: where each array lies, and that a sharded step is the step."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from lora_jax import paths
from lora_jax.sharding import state_shardings

WIDTH, HIDDEN, LAYERS = 128, 256, 2


def fn(base, x):
    """Scanned layers, then a head."""

    def body(x, layer):
        h = jnp.tanh(jnp.einsum("btd,df->btf", x, layer["up"]))
        return x + jnp.einsum("btf,fd->btd", h, layer["down"]), None

    return jax.lax.scan(body, x, base["layers"])[0] @ base["head"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[-2])


BASE = {
    "layers": {"up": normal(0, LAYERS, WIDTH, HIDDEN), "down": normal(1, LAYERS, HIDDEN, WIDTH)},
    "head": normal(2, WIDTH, 8),
}
X = jax.random.normal(jax.random.key(3), (16, 4, WIDTH))
SPEC = {"layers": lora.LoRA(4, alpha=8), "head": lora.Full()}
DELTA = lora.init(jax.random.key(0), BASE, SPEC, fn, X)
MESHES = {  # of the axes data, fsdp and tensor
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "data_fsdp": (2, 4, 1),
    "fsdp_tensor": (1, 4, 2),
    "all": (2, 2, 2),
}
SPECS = {
    "layers/up": P(None, "fsdp", "tensor"),
    "layers/down": P(None, "tensor", "fsdp"),
    "head": P("fsdp", None),
}


def mesh_of(sizes):
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def shardings(mesh):
    return paths.flatten(BASE).map(lambda path, _: NamedSharding(mesh, SPECS[path]))


@pytest.fixture(scope="module")
def mesh():
    return mesh_of((2, 2, 2))


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
    made = lora.delta_shardings(shardings(mesh), delta)
    assert jax.tree.structure(made) == jax.tree.structure(delta)
    for field, spec in expected.items():
        assert tuple(getattr(made["layers/up"], field).spec) == spec, field
    jax.device_put(delta, made)  # which fits


def test_placed_bases_and_quantised_ones_say_the_same(mesh):
    delta = lora.init(jax.random.key(0), BASE, SPEC, fn, X)
    told = lora.delta_shardings(shardings(mesh), delta)
    placed = jax.device_put(BASE, shardings(mesh))
    small = lora.quantize(placed, {"layers": lora.NF4()}, fn, X)
    trees = jax.tree.map(lambda array: array.sharding, small)
    for base in (placed, small, trees):
        assert lora.delta_shardings(base, delta) == told


def test_what_does_not_divide_is_whole(mesh):
    sharding = {"w": NamedSharding(mesh, P("fsdp", ("data", "tensor")))}
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, blocks=2, axes=("in", "out"))})
    made = lora.delta_shardings(sharding, delta)["w"]
    assert made.b.spec == P(None, None, None)  # 4 outputs in 2 blocks are 2 each, in 4 parts


def test_one_device_is_one_device():
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((8, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
    made = lora.delta_shardings({"w": jnp.ones((8, 4))}, delta)
    assert {device for leaf in jax.tree.leaves(made) for device in leaf.device_set} == {jax.devices()[0]}


def test_what_has_no_sharding_is_named(mesh):
    delta = lora.init(jax.random.key(0), BASE, SPEC, fn, X)
    whole = NamedSharding(mesh, P())
    with pytest.raises(ValueError, match=r"no sharding for 'layers/down'; nearest: 'layers/up'"):
        lora.delta_shardings({"layers": {"up": whole}, "head": whole}, delta)
    with pytest.raises(ValueError, match="'head' has no sharding: ndarray"):
        lora.delta_shardings(shardings(mesh) | {"head": np.ones((WIDTH, 8))}, delta)


def steps(base, delta, x):
    """The losses of two steps, the state after them, and the compiled step's text."""
    adapted = lora.adapt(fn)
    tx = optax.sgd(0.1, momentum=0.9)
    step = lora.train_step(lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - 1.0) ** 2), tx)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    text = step.lower(state, x).compile().as_text()
    losses = []
    with jax.log_compiles():
        for _ in range(2):
            state, metrics = step(state, x)
            losses.append(float(metrics["loss"]))
    return losses, state, text


def started(base, form):
    """The base in a format, and a delta of it."""
    base = base if form is None else lora.quantize(base, {"layers": form}, fn, X)
    return base, lora.init(jax.random.key(0), base, SPEC, fn, X)


FORMS = {"float32": None, "NF4": lora.NF4(16)}


@pytest.fixture(scope="module")
def alone():
    """On one device, by format."""
    with jax.numpy_dtype_promotion("standard"):
        return {name: steps(*started(BASE, form), X)[:2] for name, form in FORMS.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MESHES)
def test_a_sharded_step_is_the_step_of_one_device(lenient, alone, name, form, caplog):
    mesh = mesh_of(MESHES[name])
    base, delta = started(jax.device_put(BASE, shardings(mesh)), FORMS[form])
    told = lora.delta_shardings(base, delta)
    losses, state, text = steps(
        base, jax.device_put(delta, told), jax.device_put(X, NamedSharding(mesh, P(("data", "fsdp"))))
    )
    compiled = [record for record in caplog.records if "Compiling jit(body)" in record.getMessage()]
    assert len(compiled) == 1, "The state lies where the first step left it."
    expected, single = alone[form]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(state.delta), jax.tree.leaves(single.delta)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(other).max()))
    # The delta stays where it lies, and the optimizer's state lies there too.
    for leaf, sharding in zip(jax.tree.leaves(state.delta), jax.tree.leaves(told)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    trained = jax.tree.leaves(lora.partition(state.delta)[0])
    for leaf, moment in zip(trained, jax.tree.leaves(state.opt_state), strict=True):
        assert moment.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    # No weight is gathered but along the axis that FSDP divides, and nothing of the delta beyond its size.
    _, fsdp, tensor = MESHES[name]
    gathered = [math.prod(map(int, n.split(","))) for n in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)]
    largest = max(leaf.size for leaf in jax.tree.leaves(state.delta))
    allowed = largest if fsdp == 1 else max(largest, LAYERS * WIDTH * HIDDEN // tensor)
    assert all(size <= allowed for size in gathered), sorted(gathered)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "clipped_adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask=lora.optim.decay_mask)),
    "lora_plus": optax.chain(optax.adam(1e-3), lora.optim.lora_plus()),
    "groups": lora.optim.by_path({"^head": optax.sgd(0.1, momentum=0.9), "": optax.adam(1e-3)}),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=4),  # of `a` rows and columns, of `scale` nothing
    "accumulated": optax.MultiSteps(optax.chain(optax.ema(0.9), optax.sgd(0.1)), 2).gradient_transformation(),
    "rates": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "offloaded": lora.optim.host_offloaded(optax.adam(1e-3), min_size=LAYERS * 4 * WIDTH),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_shardings_are_those_of_a_state_of_placed_arrays(mesh, lenient, name):
    tx, key = OPTIMIZERS[name], jax.random.key(1)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (BASE, DELTA, key))
    state = jax.eval_shape(functools.partial(lora.TrainState.create, tx=tx), *abstract[:2], key=abstract[2])
    told = state_shardings(shardings(mesh), state, tx)
    base = jax.device_put(BASE, shardings(mesh))
    made = lora.TrainState.create(base, jax.device_put(DELTA, lora.delta_shardings(base, DELTA)), tx, key)
    assert jax.tree.structure(told) == jax.tree.structure(made)
    for (keys, to), leaf in zip(jax.tree_util.tree_leaves_with_path(told), jax.tree.leaves(made), strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim), keys
        assert leaf.sharding.memory_kind == to.memory_kind, keys


def test_state_shardings_of_quantised_bases(mesh):
    base, delta = started(BASE, lora.NF4(16))
    tx = optax.sgd(0.1)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    from_weights = state_shardings(shardings(mesh), state, tx)
    placed = jax.device_put(base, from_weights.base)
    for given in (placed, from_weights.base):
        assert jax.tree.leaves(state_shardings(given, state, tx)) == jax.tree.leaves(from_weights)
    assert placed["layers"]["up"].codes.sharding.spec == P(None, "fsdp", "tensor")


def test_state_shardings_say_what_is_missing(mesh):
    tx = optax.adam(1e-3)
    state = lora.TrainState.create(BASE, DELTA, tx, jax.random.key(1))
    with pytest.raises(ValueError, match=r"no sharding for 'other'; nearest: 'head'"):
        state_shardings(shardings(mesh), dataclasses.replace(state, base=BASE | {"other": jnp.ones(2)}), tx)
    with pytest.raises(ValueError, match="of another transform"):
        state_shardings(shardings(mesh), state, optax.sgd(0.1))
