"""Mixtral: parity with transformers, sparse products, adapters on experts, meshes, and what is refused."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import checkpoint, experts, mixtral
from experiments.models.options import Options
from experiments.training import mesh as meshes
from lora_jax import paths
from tests.experiments.decoders import FIXTURES, expected, load, names

TOLERANCE = 1e-5
RULES = {"layers/.*kernel": lora.NF4(block=4)}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits_are_those_of_transformers(scan):
    want, model = expected("mixtral"), load("mixtral", Options(scan=scan))
    assert np.abs(model.jitted(model.base, want["tokens"]) - want["logits"]).max() <= TOLERANCE
    for side in ("left", "right") if scan else ():
        mask = want[f"mask_{side}"].astype(bool)
        logits = model.jitted(model.base, want[f"prompts_{side}"], mask)
        assert np.abs(logits - want[f"logits_{side}"])[mask].max() <= TOLERANCE


def test_a_cache_changes_no_logits():
    want, model = expected("mixtral"), load("mixtral", Options(scan=True))
    mask, prompts = want["mask_left"].astype(bool), want["prompts_left"]
    cache, logits = model.model.cache(len(prompts), 12), []
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        part_logits, cache = model.jitted(model.base, prompts[:, part], mask[:, part], cache=cache)
        logits.append(part_logits)
    assert np.abs(np.concatenate(logits, axis=1) - want["logits_left"])[mask].max() <= TOLERANCE


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_checkpoints_make_the_round_trip_bit_by_bit(scan, tmp_path):
    model = mixtral.load(FIXTURES / "mixtral", Options(scan=scan), dtype=None)
    table, config = names("mixtral")
    checkpoint.save(tmp_path / "saved", lora.nnx.functional(model)[1], table, config)
    stored, written = (
        load_file(directory / "model.safetensors") for directory in (FIXTURES / "mixtral", tmp_path / "saved")
    )
    assert stored.keys() == written.keys()
    for tensor, array in stored.items():
        assert array.dtype == written[tensor].dtype and array.tobytes() == written[tensor].tobytes(), tensor
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == config


def test_bfloat16_weights_and_activations():
    model = mixtral.load(FIXTURES / "mixtral", Options(scan=True, dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    apply, base = lora.nnx.functional(model)
    logits = jax.jit(apply)(base, expected("mixtral")["tokens"])
    assert logits.dtype == jnp.bfloat16
    # where two experts' scores are close, a token may go to the other one
    assert np.corrcoef(logits.astype(jnp.float32).ravel(), expected("mixtral")["logits"].ravel())[0, 1] > 0.98


def dense(layer, x_BLD):
    """What the layer computes, with every expert's output for every token."""
    h_BLEF = jax.nn.silu(jnp.einsum("bld,edf->blef", x_BLD, layer.gate.cast()))
    h_BLEF *= jnp.einsum("bld,edf->blef", x_BLD, layer.up.cast())
    scores_BLE = jax.nn.softmax(layer.router(x_BLD))
    least_BL1 = jnp.sort(scores_BLE, axis=-1)[..., -layer.chosen, None]
    scores_BLE = jnp.where(scores_BLE >= least_BL1, scores_BLE, 0)
    scores_BLE /= scores_BLE.sum(-1, keepdims=True)
    return jnp.einsum("ble,blef,efd->bld", scores_BLE, h_BLEF, layer.down.cast())


@pytest.mark.parametrize("chosen", [1, 3])
def test_values_and_gradients_are_those_of_all_experts_weighted(getkey, chosen):
    layer = experts.SparseFeedForward(6, 10, 5, chosen, Options(), rngs=nnx.Rngs(0))
    layer.router.kernel[...] = layer.router.kernel[...].at[:, 2].set(-9)  # no token is sent to this expert
    graph, params = nnx.split(layer)
    x_BLD = jnp.abs(jax.random.normal(getkey(), (2, 7, 6)))

    def squares(compute, params, x_BLD):
        return jnp.sum(compute(nnx.merge(graph, params), x_BLD) ** 2)

    sparse = jax.jit(jax.value_and_grad(functools.partial(squares, lambda f, x: f(x)), argnums=(0, 1)))(params, x_BLD)
    whole = jax.jit(jax.value_and_grad(functools.partial(squares, dense), argnums=(0, 1)))(params, x_BLD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sparse, whole)


def moved(delta):
    """A delta whose every leaf counts."""
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape) if x.ndim else x, delta)


@pytest.mark.parametrize("recipe", [lora.LoRA(2, alpha=4), lora.DoRA(2, alpha=4)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("rules", [{}, {"gate|up|down": lora.NF4(block=2)}], ids=["float", "NF4"])
def test_adapters_on_experts_train_as_merged_weights_would(getkey, recipe, rules):
    apply, base = lora.nnx.functional(experts.SparseFeedForward(6, 10, 5, 2, Options(), rngs=nnx.Rngs(0)))
    x_BLD = jax.random.normal(getkey(), (2, 7, 6))
    base = lora.quantize(base, rules, apply, x_BLD)
    delta = moved(lora.init(getkey(), base, {"": recipe}, apply, x_BLD))
    assert delta["gate/kernel"].axes == ("batch", "in", "out")

    def squares(apply, base):
        train, frozen = lora.partition(delta)
        return jax.jit(jax.value_and_grad(lambda train: jnp.sum(apply(base, lora.join(train, frozen)) ** 2)))(train)

    actual = squares(lambda base, delta: lora.adapt(apply)(base, delta, x_BLD), base)
    want = squares(lambda base, delta: apply(lora.merge(base, delta), x_BLD), lora.dequantize(base))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, want)


def adapted(recipe, rules=None):
    """The stored model, its base and a delta on experts and router."""
    model, tokens = load("mixtral", Options(scan=True)), expected("mixtral")["tokens"]
    base = lora.quantize(model.base, rules or {}, model.apply, tokens)
    return model, base, moved(lora.init(jax.random.key(0), base, {"feed_forward/": recipe}, model.apply, tokens))


def test_adapters_on_experts_stay_factored():
    model, base, delta = adapted(lora.LoRA(2), RULES)
    assert [path.rpartition("feed_forward/")[2] for path in delta] == [
        "down/kernel",
        "gate/kernel",
        "router/kernel",
        "up/kernel",
    ]
    explained = lora.explain(model.apply, base, delta, batch())
    assert explained.factored and "merged" not in str(explained)


def loss_of(apply):
    """The loss and the gradients of the trained leaves, compiled."""

    @jax.jit
    def run(train, frozen, base, tokens):
        def loss(train):
            return jnp.mean(apply(base, lora.join(train, frozen), tokens, labels_BL=jnp.roll(tokens, -1, axis=1)))

        return jax.value_and_grad(loss)(train)

    return run


def batch():
    return np.concatenate([expected("mixtral")["tokens"]] * 3)[:8]


# data, fsdp and tensor parallelism at once; between layers tokens are whole, or divided over tensor too
@pytest.mark.parametrize(
    ("recipe", "rules", "sequence"),
    [(lora.LoRA(2, alpha=4), RULES, False), (lora.DoRA(2, alpha=4), None, True)],
    ids=["LoRA-NF4", "DoRA-float-sequence"],
)
def test_on_a_mesh_it_computes_and_learns_the_same(recipe, rules, sequence):
    model, base, delta = adapted(recipe, rules)
    want, wanted = loss_of(lora.adapt(model.apply))(*lora.partition(delta), base, batch())
    sizes = meshes.MeshSizes(data=2, fsdp=2, tensor=2, sequence=sequence)
    mesh = meshes.make_mesh(sizes)
    sharding_of = meshes.weight_shardings(mesh, mixtral.AXES)
    with jax.set_mesh(mesh):
        options = Options(scan=True, shards=sizes.shards)
        divided = mixtral.load(FIXTURES / "mixtral", options, rules=rules, sharding=sharding_of)
    apply, here = lora.nnx.functional(divided)
    jax.tree.map(np.testing.assert_array_equal, here, base)
    gate = here["layers"]["feed_forward"]["gate"]["kernel"]
    assert (gate.codes if rules else gate).sharding.spec[-3:] == (None, "fsdp", "tensor")
    where = paths.flatten(base).map(lambda path, leaf: sharding_of(path, leaf.shape))
    there = jax.device_put(delta, lora.delta_shardings(where, delta))
    tokens = jax.device_put(batch(), meshes.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = loss_of(lora.adapt(apply)).lower(*lora.partition(there), here, tokens).compile()
        actual, grads = compiled(*lora.partition(there), here, tokens)
    np.testing.assert_allclose(actual, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, wanted)
    # each device sorts the pairs of its own two rows, and an expert's weights cross devices as they are stored
    text = str(compiled.as_text())
    assert set(re.findall(r"= \((\w+\[\d+\])[^)]*\) sort\(", text)) == {"s32[48]"}
    gathered = set(re.findall(r"= (\w+)\[(?:1,)?4,(?:8,12|16,12|6,16|12,16)\]\S* all-gather\(", text))
    assert gathered == {"u8" if rules else "f32"}


def test_examples_that_the_mesh_cannot_divide(getkey):
    layer = experts.SparseFeedForward(6, 10, 5, 2, Options(), rngs=nnx.Rngs(0))
    x_BLD = jax.random.normal(getkey(), (3, 7, 6))
    want = layer(x_BLD)
    layer.options = Options(shards=meshes.MeshSizes(data=4, tensor=2, sequence=True).shards)
    with jax.set_mesh(meshes.make_mesh(meshes.MeshSizes(data=4, tensor=2))):
        np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x_BLD), want, atol=1e-5)


def test_adapters_on_experts_go_through_peft_and_back(tmp_path):
    _, base, delta = adapted(lora.LoRA(2, alpha=4))
    table, _ = names("mixtral")
    lora.peft.save(tmp_path, delta, table)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.model.layers.1.mlp.experts.lora_A.weight"].shape[0] == 2 * 4
    again = lora.peft.load(tmp_path, base, table)
    assert again.keys() == delta.keys()
    jax.tree.map(np.testing.assert_array_equal, again, delta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', supported is 'mixtral'"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1, supported is 0"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected 1 to num_local_experts 4"),
        ({"num_local_experts": "many"}, "num_local_experts is 'many', expected a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        mixtral.MixtralConfig.from_json(names("mixtral")[1] | changes)


def test_what_a_config_leaves_out_is_what_transformers_takes():
    config = names("mixtral")[1]
    left_out = ("sliding_window", "rms_norm_eps", "rope_parameters", "num_experts_per_tok", "router_jitter_noise")
    shape = mixtral.MixtralConfig.from_json({name: value for name, value in config.items() if name not in left_out})
    assert shape == mixtral.MixtralConfig.from_json(config)
    assert not any(shape.sliding) and shape.rms_norm_eps == 1e-5
    np.testing.assert_allclose(shape.rope.frequencies, [1, 1e6**-0.5], rtol=1e-6)
    window = mixtral.MixtralConfig.from_json(config | {"sliding_window": 4})
    assert all(window.sliding) and window.sliding_window == 4
