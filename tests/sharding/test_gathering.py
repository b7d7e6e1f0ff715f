"""FSDP over a quantized base: where a weight is used its codes are gathered, and floats are made of them there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quantized_bases import quantize

import lora_jax as lora
from lora_jax.quantization import gathered, shardings
from sharding.collectives import collectives
from sharding.problem import (
    HIDDEN,
    RANK,
    WIDTH,
    X,
    alone,
    assert_at_home,
    assert_same,
    model,
    placed,
    started,
    three,
    trained,
)

FORM, SMALL = lora.NF4(8), lora.NF4(4)
MESHES = {"fsdp": three(1, 8, 1), "all": three(2, 2, 2)}
U = P.UNCONSTRAINED


@pytest.mark.parametrize("name, form", [*((name, FORM) for name in MESHES), ("all", lora.Q4_1())])
def test_a_step_gathers_codes_and_is_the_step_of_one_device(name, form):
    layout = MESHES[name]
    mesh = layout.mesh()
    base, delta, x = placed(layout, mesh, *started(form=form))
    got = trained(model(layout, mesh), gathered(base, "fsdp"), delta, x)
    assert_same(got, alone(form=form))
    assert_at_home(got.state, layout, mesh)
    layer = WIDTH * HIDDEN // layout.sizes["tensor"]
    moved = [one for one in collectives(got.text) if one.moves and RANK not in one.shape]
    codes = [one for one in moved if one.dtype == "u8" and one.size == layer // form.block * form.block_bytes]
    # Each of the two weights for its product, and again for the gradient of the product's input.
    assert len(codes) == 4, moved
    assert not any(one.once for one in codes), "layers are gathered before the loop over them"
    assert not [one for one in moved if one.dtype != "u8" and one.size >= layer], "floats are gathered"


WEIGHT = jax.random.normal(jax.random.key(0), (2, 128, 64))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def leaf_on(mesh, spec, form=SMALL):
    weight = jax.device_put(WEIGHT, NamedSharding(mesh, spec))
    form = dataclasses.replace(form, axes=("batch", "in", "out"))
    return gathered(quantize({"w": weight}, {"w": form}), "fsdp")["w"]


def test_what_is_said_of_each_axis(mesh):
    assert leaf_on(mesh, P(None, "fsdp", "tensor")).used == P(None, U)
    assert leaf_on(mesh, P(None, "tensor", "fsdp")).used == P(U, None)
    assert leaf_on(mesh, P(None, None, ("fsdp", "tensor"))).used == P(U, "tensor")
    assert leaf_on(mesh, P("tensor", "fsdp")).used == P(None, U)
    for spec in (P(), P(None, None, "tensor"), P(("tensor",), None, None)):
        assert leaf_on(mesh, spec).used == P()
    floats = {"b": jnp.ones(3)}
    assert gathered(floats, "fsdp")["b"] is floats["b"]
    alone = lora.quantize({"w": WEIGHT}, {"w": lora.NF4(axes=("batch", "in", "out"))})
    assert gathered(alone, "fsdp")["w"].used == P()


def test_it_stays_with_what_is_made_of_the_leaf(mesh):
    leaf = leaf_on(mesh, P(None, None, ("fsdp", "tensor")))
    again = leaf.requantized(WEIGHT)
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    assert shardings(leaf, NamedSharding(mesh, P(None, None, ("fsdp", "tensor")))).used == leaf.used
    assert jax.tree.map(lambda array: array[0], leaf).used == leaf.used


def test_dequantized_outside_of_a_function_it_stays_divided(mesh):
    leaf = leaf_on(mesh, P(None, "fsdp", "tensor"))
    for values in (leaf.dequantize(), jax.jit(lambda leaf: leaf.dequantize())(leaf)):
        assert values.sharding.spec == P(None, "fsdp", "tensor")


@pytest.mark.parametrize(
    "spec, form, moved",
    [
        (P(None, "fsdp", None), lora.NF4(4), {("u8", (64, 64)), ("u8", (32, 64))}),
        (P(None, None, "fsdp"), lora.NF4(4), {("u8", (64, 64)), ("u8", (32, 64)), ("f32", (8,))}),
        (P(None, None, ("tensor", "fsdp")), lora.NF4(4), {("u8", (64, 32)), ("u8", (32, 32)), ("f32", (4,))}),
        (P(None, "fsdp", None), lora.Q4_1(), {("u8", (80, 64))}),
        (P(None, None, ("tensor", "fsdp")), lora.Q4_K(), {("u8", (144, 32))}),
    ],
    ids=["in", "out", "out_both", "in_Q4_1", "out_both_Q4_K"],
)
def test_scales_come_with_their_codes(mesh, spec, form, moved):
    leaf = leaf_on(mesh, spec, form)
    x = jax.device_put(X[:, :1], NamedSharding(mesh, P("fsdp")))
    fn = lora.adapt(lambda base, x: jax.lax.scan(lambda x, w: (x, x @ w), x, base["w"])[1])
    compiled = jax.jit(fn).lower({"w": leaf}, {}, x).compile()
    moving_results = [one for one in collectives(compiled.as_text()) if one.moves]
    assert {(one.dtype, tuple(size for size in one.shape if size > 1)) for one in moving_results} == moved
    expected = jnp.einsum("btd,ldf->lbtf", X[:, :1], leaf.dequantize())
    np.testing.assert_allclose(compiled({"w": leaf}, {}, x), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_a_table_lie_where_their_indices_do(mesh):
    form = lora.NF4(16, axes=("lookup", "out"))
    for spec in (P("fsdp", None), P("fsdp", "tensor"), P(None, "fsdp")):
        table = jax.device_put(WEIGHT[0], NamedSharding(mesh, spec))
        base = gathered(lora.quantize({"w": table}, {"w": form}), "fsdp")
        tokens = jax.device_put(jnp.arange(8).reshape(8, 1), NamedSharding(mesh, P("fsdp")))
        rows = jax.jit(lora.adapt(lambda base, tokens: base["w"][tokens]))(base, {}, tokens)
        np.testing.assert_array_equal(rows, base["w"].dequantize()[:8, None])


def test_explicit_axes_and_shard_map_take_such_leaves(mesh):
    spec, x = P("fsdp", "tensor"), X[0, :8]
    expected = x @ leaf_on(mesh, P(None, *spec)).dequantize()[0]
    form = lora.NF4(4, axes=("in", "out"))

    explicit = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    weight = jax.device_put(WEIGHT[0], NamedSharding(explicit, spec))
    base = gathered(lora.quantize({"w": weight}, {"w": form}), "fsdp")
    fn = lora.adapt(lambda base, x: x @ jax.reshard(base["w"], P(None, "tensor")))
    with jax.set_mesh(explicit):
        y = jax.jit(fn)(base, {}, jax.device_put(x, NamedSharding(explicit, P("fsdp"))))
    assert y.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

    base = gathered(lora.quantize({"w": jax.device_put(WEIGHT[0], NamedSharding(mesh, spec))}, {"w": form}), "fsdp")
    inner = lambda x, w: jax.lax.psum(x @ w, "fsdp")  # noqa: E731
    for axes in ({"fsdp", "tensor"}, {"fsdp"}):
        specs = [P(*(name if name in axes else None for name in along)) for along in ((None, "fsdp"), spec)]
        out = P(None, "tensor" if "tensor" in axes else None)
        options = {"mesh": mesh, "in_specs": tuple(specs), "out_specs": out, "axis_names": axes, "check_vma": False}
        mapped = jax.jit(lora.adapt(lambda base, x, options=options: jax.shard_map(inner, **options)(x, base["w"])))
        np.testing.assert_allclose(mapped(base, {}, x), expected, rtol=1e-4, atol=1e-5)


def test_on_devices_without_a_mesh_nothing_changes(mesh):
    leaf = jax.device_put(leaf_on(mesh, P(None, "fsdp")), jax.devices()[0])
    fn = jax.jit(lora.adapt(lambda base, x: x @ base["w"][0]))
    np.testing.assert_allclose(fn({"w": leaf}, {}, X[0]), X[0] @ leaf.dequantize()[0], rtol=1e-4, atol=1e-5)


def test_errors(mesh):
    leaf = leaf_on(mesh, P(None, "fsdp"))
    with pytest.raises(ValueError, match=r"gathered\(…, 'model'\): the mesh has the axes fsdp, tensor"):
        gathered({"w": leaf}, "model")
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda leaf: gathered({"w": leaf}, "fsdp"))(leaf)
