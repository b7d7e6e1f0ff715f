"""Adapters of other families are saved as the LoRA that they equal, or refused by name.

PEFT has its own formats for most of them: see `test_methods.py`.
"""

import jax
import numpy as np
import pytest

import lora_jax as lora

NAMES = lora.peft.Names((lora.peft.Weight("up/kernel", "mlp.up_proj.weight", lora.peft.LINEAR),))
BASE = {"up": {"kernel": jax.random.normal(jax.random.key(1), (8, 12))}}


def trained(recipe):
    """A delta of which every trained leaf has moved."""
    delta = lora.init(jax.random.key(0), BASE, {"up": recipe})
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return lora.join(treedef.unflatten(x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)), frozen)


@pytest.mark.parametrize(
    "recipe, rank",
    [
        (lora.LoRAFA(2, alpha=4, axes=("in", "out")), 2),
        (lora.AdaLoRA(3, alpha=4, axes=("in", "out")), 3),
        (lora.VeRA(5, axes=("in", "out")), 5),
        (lora.LoHa(2, alpha=4, axes=("in", "out")), 4),
    ],
    ids=["LoRAFA", "AdaLoRA", "VeRA", "LoHa"],
)
def test_a_product_of_two_factors_is_written_as_lora(recipe, rank, tmp_path, capsys):
    delta = trained(recipe)
    lora.peft.save(tmp_path / "adapter", delta, NAMES, target="vllm")
    loaded = lora.peft.load(tmp_path / "adapter", BASE, NAMES)
    assert loaded["up/kernel"].kind == "LoRA" and loaded["up/kernel"].rank == rank
    np.testing.assert_allclose(
        lora.merge(BASE, loaded)["up"]["kernel"], lora.merge(BASE, delta)["up"]["kernel"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "recipe, message",
    [
        (lora.IA3(axes=("in", "out")), "'up/kernel': PEFT's LoRA has no counterpart of IA3"),
        (lora.LoKr(1, axes=("in", "out")), "'up/kernel': PEFT's LoRA has no counterpart of LoKr"),
        (lora.DVoRA(2, axes=("in", "out")), "'up/kernel': PEFT's LoRA has no counterpart of DVoRA"),
        (lora.DoRA(2, axes=("in", "out"), norm_over="out"), "'up/kernel': PEFT's DoRA has a magnitude for each output"),
    ],
    ids=["IA3", "LoKr", "DVoRA", "DoRA over the outputs"],
)
def test_what_it_cannot_hold_is_refused(recipe, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lora.peft.save(tmp_path / "adapter", trained(recipe), NAMES, target="vllm")
    assert not list(tmp_path.iterdir())
