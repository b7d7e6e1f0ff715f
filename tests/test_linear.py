"""all_linear: which weights it stands for."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lora


def model(p, ids):
    x = p["embed"][ids] + p["positions"][None]
    x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer["w"]) + layer["b"][None, None], None), x, p["layers"])
    experts = jnp.einsum("ebtd,edf->ebtf", jnp.stack([x, x]), p["experts"]).sum(0)
    x = jax.lax.conv_general_dilated(experts, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    x = jax.checkpoint(lambda x: x @ p["block"]["kernel"] + p["block"]["bias"][None, None])(x * p["scale"][None, None])
    return x @ p["lm_head"], x @ p["embed"].T


def shapes(**others):
    sizes = {"embed": (9, 4), "positions": (5, 4), "experts": (2, 4, 4), "conv": (3, 4, 4), "scale": (4,)}
    tree = {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    tree["layers"] = {"w": jax.ShapeDtypeStruct((3, 4, 4), jnp.float32), "b": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    tree["block"] = {
        "kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    return {**tree, "lm_head": jax.ShapeDtypeStruct((4, 9), jnp.float32), **others}


IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


def init(spec, base, fn=model, *args):
    return lora.init(jax.random.key(0), base, spec, fn, *(args or (IDS,)))


def test_layers_experts_and_blocks_without_embeddings_convolutions_and_the_head():
    delta = init(lora.all_linear(lora.LoRA(2)), shapes())
    assert set(delta) == {"experts", "layers/w", "block/kernel"}
    assert delta["layers/w"].a.shape == (3, 2, 4) and delta["experts"].axes == ("batch", "in", "out")


def test_beside_patterns_the_first_match_wins():
    base = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes())
    spec = {"lm_head|bias": lora.Full(), "experts": None, "block": lora.LoRA(1), lora.all_linear: lora.LoRA(2)}
    delta = init(spec, base)
    assert set(delta) == {"lm_head", "block/bias", "block/kernel", "layers/w"}
    assert delta["block/kernel"].rank == 1 and delta["layers/w"].rank == 2


def test_a_head_alone_is_linear():
    delta = init(
        lora.all_linear(lora.LoRA(1)), {"head": jnp.ones((4, 3))}, lambda p, x: x @ p["head"], jnp.ones((2, 4))
    )
    assert set(delta) == {"head"}


def test_lists_and_codes():
    net = nnx.Sequential(
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.LayerNorm(64, rngs=nnx.Rngs(1)), nnx.Linear(64, 8, rngs=nnx.Rngs(2))
    )
    fn, base = lora.nnx.functional(net)
    x = jnp.ones((2, 64))
    small = lora.quantize(base, {"": lora.NF4()}, fn, x)
    for tree in (base, small):
        assert set(init(lora.all_linear(lora.LoRA(2)), tree, fn, x)) == {"layers/0/kernel", "layers/2/kernel"}


def test_refusals():
    with pytest.raises(ValueError, match="all_linear needs a function to trace"):
        lora.init(jax.random.key(0), shapes(), lora.all_linear(lora.LoRA(2)))
    with pytest.raises(ValueError, match="all_linear: the function multiplies no weight"):
        init(lora.all_linear(lora.LoRA(2)), {"w": jnp.ones(4)}, lambda p, x: x * p["w"], jnp.ones(4))
    with pytest.raises(ValueError, match=r"'lm_head' is fully shadowed|all_linear is fully shadowed"):
        init({"": lora.Full(), lora.all_linear: lora.LoRA(2)}, shapes())
    with pytest.raises(TypeError, match=r"all_linear\(recipe\): a recipe.*got int"):
        lora.all_linear(8)
    for spec, message in (
        (lora.all_linear, r"lora.all_linear\(lora.LoRA\(8\)\) is one"),
        ("all-linear", r"lora.all_linear\(lora.LoRA\(8\)\) is one"),
        (lora.LoRA(2), r"lora.all_linear\(LoRA\(…\)\)"),
    ):
        with pytest.raises(TypeError, match=message):
            init(spec, shapes())
    with pytest.raises(ValueError, match=r"write lora\.all_linear, without quotes"):
        init({"all-linear": lora.LoRA(2)}, shapes())
