"""A training step on a mesh is the step of one device, and moves no more than it has to."""

import jax
import pytest

import lora_jax as lora
from sharding.collectives import Collective, collectives
from sharding.problem import (
    BATCH,
    HIDDEN,
    LENGTH,
    OUTPUTS,
    RANK,
    TX,
    WIDTH,
    Layout,
    Trained,
    X,
    alone,
    assert_at_home,
    assert_same,
    model,
    placed,
    started,
    step_of,
    three,
    trained,
)

MESHES = {
    "data": three(8, 1, 1),
    "fsdp": three(1, 8, 1),
    "tensor": three(1, 1, 8),
    "data_fsdp": three(2, 4, 1),
    "fsdp_tensor": three(1, 4, 2),
    "all": three(2, 2, 2),
}


def check_traffic(transfers: list[Collective], layout: Layout) -> None:
    """No weight of the base is gathered but along FSDP's axis, layer by layer; of the delta no more than there is."""
    _, fsdp, tensor = layout.sizes.values()
    layer, factor = WIDTH * HIDDEN // tensor, RANK * max(WIDTH, HIDDEN)
    moved = [one for one in transfers if one.moves]
    for one in moved:
        assert one.size <= (factor if RANK in one.shape else max(layer, WIDTH * OUTPUTS)), one
    weights = [one for one in moved if one.size == layer]  # of NF4 scales may be moved too, which are less
    assert not any(one.once for one in weights), "layers are gathered before the loop over them"
    # Each of the two weights before its product, and again for the gradient of the product's input.
    assert len(weights) == (0 if fsdp == 1 else 4), weights
    tokens = BATCH * LENGTH // (layout.sizes["data"] * fsdp)
    for one in transfers:  # sums are of activations or of the delta's gradients: nothing of a weight's size is summed
        assert one.moves or one.size <= max(tokens * WIDTH, factor), one
    if layout.sizes["data"] == 8:
        assert not moved


@pytest.mark.parametrize(
    "name, form",
    [
        *((name, None) for name in MESHES),
        *((name, lora.NF4(8)) for name in ("fsdp", "tensor", "all")),
        # Of shards in blocks of 32 there are no more than two along the axes of this model.
        *(("all", form) for form in (lora.Q8_0(), lora.Q4_1())),
        ("data", lora.Q4_K()),
    ],
    ids=lambda value: value if isinstance(value, str) else "float32" if value is None else value.name,
)
def test_a_sharded_step_is_the_step_of_one_device(name, form):
    layout = MESHES[name]
    mesh = layout.mesh()
    got = trained(model(layout, mesh), *placed(layout, mesh, *started(form=form)))
    assert_same(got, alone(form=form))
    assert_at_home(got.state, layout, mesh)
    check_traffic(collectives(got.text), layout)


@pytest.mark.parametrize("mix", ["DoRA_VeRA_Full", "AdaLoRA_DoRA_LoRA"])
def test_every_recipe(mix):
    layout = MESHES["all"]
    mesh = layout.mesh()
    got = trained(model(layout, mesh), *placed(layout, mesh, *started(mix)))
    assert_same(got, alone(mix))
    assert_at_home(got.state, layout, mesh)


def test_pmap_is_the_step_of_one_device():
    base, delta = started()
    step, state, losses = step_of(model(), pmap=True), lora.TrainState.create(base, delta, TX, jax.random.key(1)), []
    for _ in alone().losses:
        state, metrics = step(state, X)
        losses.append(float(metrics["loss"]))
    assert_same(Trained(losses, state, ""), alone())


def test_the_partitioner_needs_no_constraints():
    """A function that says nothing of meshes: data, FSDP and tensor parallelism follow from where its arrays are."""
    layout = MESHES["all"]
    mesh = layout.mesh()
    got = trained(model(), *placed(layout, mesh, *started()))
    assert_same(got, alone())
    check_traffic(collectives(got.text), layout)
