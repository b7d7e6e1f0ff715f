"""Meshes with explicit axes: shardings are a part of types, and the low-rank products have theirs from the base's."""

import jax
import pytest
from jax.sharding import AxisType

import lora_jax as lora
from sharding.collectives import moved_tokens
from sharding.problem import (
    BATCH,
    HIDDEN,
    LENGTH,
    OUTPUTS,
    RANK,
    SEQUENCES,
    WIDTH,
    alone,
    assert_at_home,
    assert_same,
    model,
    placed,
    started,
    three,
    trained,
)

LAYOUTS = {"all": three(2, 2, 2)} | {name: SEQUENCES[name] for name in ("data_sequence_tensor", "over_tensor")}
NEEDED = {  # by the base's own products: FSDP's layers, the tokens before up and the gradient of what down gave
    "all": sorted([(WIDTH, OUTPUTS), *[(WIDTH, HIDDEN // 2), (HIDDEN // 2, WIDTH)] * 2]),
    "data_sequence_tensor": [],
    "over_tensor": [(BATCH // 2, LENGTH, WIDTH)] * 2,
}
CASES = {
    "all": ("all", "LoRA_Full", None),
    "all_NF4": ("all", "LoRA_Full", lora.NF4(8)),
    "all_Q4_0": ("all", "LoRA_Full", lora.Q4_0()),
    "all_recipes": ("all", "DoRA_VeRA_Full", None),
    "all_blocks": ("all", "blocks_LoKr_IA3", None),
    "all_biases": ("all", "biases", None),
    "sequence_recipes": ("data_sequence_tensor", "AdaLoRA_DoRA_LoRA", None),
    "over_tensor": ("over_tensor", "LoRA_Full", None),
    "over_tensor_recipes": ("over_tensor", "DoRA_VeRA_Full", None),
    "over_tensor_biases": ("over_tensor", "biases", None),
    "over_tensor_blocks": ("over_tensor", "DVoRA_blocks_LoRAFA", None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_explicit_axes_is_the_step_of_one_device(case):
    name, mix, form = CASES[case]
    layout = LAYOUTS[name]
    mesh = layout.mesh(AxisType.Explicit)
    # Without remat JAX keeps layers of floats, once gathered, for the backward pass.
    fn = model(layout, mesh, remat=name == "all" and form is None)
    with jax.set_mesh(mesh):  # types tell which tokens are divided: flatten=False need not be said
        got = trained(fn, *placed(layout, mesh, *started(mix, form)))
    assert_same(got, alone(mix, form))
    assert_at_home(got.state, layout, mesh)
    assert moved_tokens(got.text, WIDTH, RANK) == NEEDED[name]
