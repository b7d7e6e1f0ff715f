"""Weights that PyTorch ties: one leaf here, two modules in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.peft import LINEAR, Names, Weight
from tests.peft.cases import PREFIX, read, read_config, write_adapter

NAMES = Names(
    (
        Weight("embed/embedding", "embed.weight", module="embedding", tied=("head.weight",)),
        Weight("mid/kernel", "mid.weight", LINEAR),
    )
)
BASE = {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}, "mid": {"kernel": jnp.ones((3, 3))}}


def trained(recipe):
    delta = lora.init(jax.random.key(0), BASE, {"embed": recipe, "mid": lora.LoRA(1, alpha=1.5, axes=("in", "out"))})
    train, frozen = lora.partition(delta)
    return lora.join(jax.tree.map(lambda leaf: leaf + 0.5, train), frozen)


@pytest.mark.parametrize(
    "recipe",
    [
        lora.LoRA(2, alpha=3, axes=("lookup", "out")),
        lora.Full(),
        lora.Rows((2, 0), axes=("lookup", "out")),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_both_modules_are_written_and_one_leaf_is_read(recipe, tmp_path):
    delta = trained(recipe)
    lora.peft.save(tmp_path / "out", delta, NAMES)
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", BASE, NAMES), delta)


@pytest.mark.parametrize("recipe", [lora.LoRA(2, axes=("lookup", "out")), lora.Full()], ids=["LoRA", "Full"])
def test_an_adapter_of_one_of_the_two_is_refused(recipe, tmp_path):
    lora.peft.save(tmp_path / "out", trained(recipe), NAMES)
    tensors = read(tmp_path / "out" / "adapter_model.safetensors")
    config = read_config(tmp_path / "out") | {"ensure_weight_tying": False, "modules_to_save": ["embed"]}
    write_adapter(tmp_path / "out", {k: v for k, v in tensors.items() if f"{PREFIX}head" not in k}, config)
    with pytest.raises(ValueError, match=r"tied: .*head\.weight"):
        lora.peft.load(tmp_path / "out", BASE, NAMES)


def test_a_delta_without_factors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no factors"):
        lora.peft.save(tmp_path / "out", lora.init(jax.random.key(0), BASE, {"mid": lora.Full()}), NAMES)


def test_factors_that_differ_between_the_two_are_refused(tmp_path):
    lora.peft.save(tmp_path / "out", trained(lora.LoRA(2, axes=("lookup", "out"))), NAMES)
    tensors = read(tmp_path / "out" / "adapter_model.safetensors")
    tensors[f"{PREFIX}head.lora_A.weight"] = tensors[f"{PREFIX}head.lora_A.weight"] + 1
    write_adapter(tmp_path / "out", tensors, read_config(tmp_path / "out"))
    with pytest.raises(ValueError, match="not the transpose"):
        lora.peft.load(tmp_path / "out", BASE, NAMES)
