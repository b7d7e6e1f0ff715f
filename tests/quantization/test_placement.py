"""Codes and scales on meshes: sharded is unsharded bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quantized_bases import quantize

import lora_jax as lora
from lora_jax.quantization import encoding, from_gguf, shardings

FORM = lora.NF4(axes=("in", "out"))
WEIGHT = jax.random.normal(jax.random.key(0), (512, 256)) / 20
X = jax.random.normal(jax.random.key(1), (3, 512))


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("m", "n"), axis_types=(kind,) * 2)


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(AxisType.Auto)


@pytest.fixture(scope="module")
def whole():
    return lora.quantize({"w": WEIGHT}, {"w": FORM})["w"]


def placed(mesh, spec, weight=WEIGHT, form=FORM):
    return quantize({"w": jax.device_put(weight, NamedSharding(mesh, spec))}, {"w": form})["w"]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        np.testing.assert_array_equal(a, b)


SPECS = {  # of the weight; of codes and scales, of the second level
    "in": (P("m", None), P("m", None), P(None)),
    "out": (P(None, "m"), P(None, "m"), P("m")),
    "both": (P("m", "n"), P("m", "n"), P(None)),
    "in over both axes": (P(("m", "n"), None), P(("m", "n"), None), P(None)),
    "out over both axes": (P(None, ("m", "n")), P(None, ("m", "n")), P(("m", "n"))),
    "not at all": (P(), P(None, None), P(None)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_sharded_weight_has_the_codes_of_the_whole_one_on_its_devices(mesh, whole, name):
    spec, codes, second = SPECS[name]
    leaf = placed(mesh, spec)
    assert_same(leaf, whole)
    assert [array.sharding.spec for array in jax.tree.leaves(leaf)] == [codes, codes, second, P()]
    values = jax.jit(lambda leaf: leaf.dequantize())
    np.testing.assert_array_equal(values(leaf), values(whole))


@pytest.mark.parametrize("form", [lora.Q8_0, lora.Q4_0, lora.Q4_1, lora.Q4_K])
def test_blocks_of_a_file_are_sharded_like_the_weight(mesh, form):
    roles = ("in", "out")
    whole = quantize({"w": WEIGHT}, {"w": form(axes=roles)})["w"]
    for spec in (P("n", "m"), P(None, ("m", "n"))):  # of Q4_K's blocks there are two along the in axis
        leaf = placed(mesh, spec, form=form(axes=roles))
        assert_same(leaf, whole)
        assert [array.sharding.spec for array in jax.tree.leaves(leaf)] == [spec]
        np.testing.assert_array_equal(jax.jit(lambda leaf: leaf.dequantize())(leaf), whole.dequantize())
        read = from_gguf(np.asarray(whole.codes).T, form().name)
        assert_same(jax.device_put(read, shardings(read, NamedSharding(mesh, spec))), whole)


def test_weights_of_a_kind_on_a_mesh_are_quantized_by_one_function(mesh):
    placed(mesh, P(None, "n"))
    before = encoding._compiled.cache_info()
    placed(mesh, P(None, "n"), 2 * WEIGHT)
    after = encoding._compiled.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)


def test_shards_that_are_no_whole_blocks_are_told_with_the_block_that_fits(mesh):
    with pytest.raises(
        ValueError,
        match=r"'w': each shard .* 24 weights for an output, .* not a multiple of the block of 64; block=8 fits",
    ):
        placed(mesh, P("m", "n"), WEIGHT[:96])
    leaf = placed(mesh, P("m", "n"), WEIGHT[:96], lora.NF4(8, axes=("in", "out")))
    assert leaf.codes.sharding.spec == P("m", "n")
    with pytest.raises(ValueError, match=r"24 weights .* not a multiple of the block of 32. Or shard another axis"):
        placed(mesh, P("m", "n"), WEIGHT[:96], lora.Q4_1(axes=("in", "out")))
    with pytest.raises(ValueError, match=r"128 weights .* not a multiple of the block of 256. Or shard another axis"):
        placed(mesh, P("m", "n"), WEIGHT, lora.Q4_K(axes=("in", "out")))


def test_an_axis_of_one_device_divides_no_blocks():
    mesh = jax.make_mesh((8, 1), ("m", "n"), axis_types=(AxisType.Auto,) * 2)
    leaf = placed(mesh, P("n", "m"), WEIGHT[:96], lora.NF4(axes=("in", "out")))  # of 64 and a part
    assert leaf.codes.sharding.spec == P("n", "m")
    np.testing.assert_allclose(leaf.dequantize(), WEIGHT[:96], atol=0.05)


def test_several_blocked_axes_are_divided_along_the_first(mesh):
    form = lora.NF4(axes=("in", "in", "out"))
    weight = WEIGHT.reshape(8, 64, 256)
    assert placed(mesh, P("m", None, "n"), weight, form).codes.sharding.spec == P("m", "n")
    with pytest.raises(ValueError, match="only the first of these can be sharded"):
        placed(mesh, P(None, "m", None), weight, form)


def test_stacked_layers_are_sharded_like_one(mesh):
    form = lora.NF4(axes=("batch", "in", "out"))
    leaf = placed(mesh, P(None, None, "m"), jnp.stack([WEIGHT, 2 * WEIGHT]), form)
    specs = [array.sharding.spec for array in jax.tree.leaves(leaf)]
    assert specs == [P(None, None, "m"), P(None, None, "m"), P(None, "m"), P(None)]


def test_shapes_get_shardings_too(mesh):
    shape = jax.ShapeDtypeStruct(WEIGHT.shape, WEIGHT.dtype, sharding=NamedSharding(mesh, P(None, "m")))
    leaf = lora.quantize({"w": shape}, {"w": FORM})["w"]
    assert [array.sharding.spec for array in jax.tree.leaves(leaf)] == [P(None, "m"), P(None, "m"), P("m"), P()]


@pytest.mark.parametrize(
    "spec, form",
    [
        *((spec, FORM) for spec in (P("m", None), P(None, "m"), P("n", "m"))),
        (P("m", None), lora.Q8_0(axes=("in", "out"))),
        (P(None, "m"), lora.Q4_0(axes=("in", "out"))),
        (P("m", "n"), lora.Q4_1(axes=("in", "out"))),
        (P("n", "m"), lora.Q4_K(axes=("in", "out"))),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_meshes_with_explicit_axes(spec, form):
    mesh, whole = mesh_of(AxisType.Explicit), quantize({"w": WEIGHT}, {"w": form})["w"]
    leaf = placed(mesh, spec, form=form)
    assert_same(leaf, whole)
    out = NamedSharding(mesh, P(None, spec[1]))
    fn = lambda base, x: jnp.tanh(jnp.dot(x, base["w"], out_sharding=out))  # noqa: E731
    x, base = jax.device_put(X, NamedSharding(mesh, P())), {"w": leaf}
    adapted = lora.adapt(fn)
    delta = lora.init(jax.random.key(0), base, {"w": lora.DoRA(4)}, fn, x)
    result = jax.jit(adapted)(base, delta, x)
    assert result.sharding.spec == out.spec
    np.testing.assert_allclose(result, jnp.tanh(X @ whole.dequantize()), rtol=1e-4, atol=1e-5)
    train, frozen = lora.partition(delta)
    gradients = jax.jit(jax.grad(lambda train: jnp.sum(adapted(base, lora.join(train, frozen), x))))(train)
    assert jnp.isfinite(gradients["w"].b).all()


def sharded(mesh, spec, inner, before=lambda w: w):
    """x·W in shards, summed where the in axis is divided."""
    in_axis, out_axis = spec
    x_spec, out_spec = P(None, in_axis), P(None, out_axis)
    return lambda base, x: jax.shard_map(
        inner, mesh=mesh, in_specs=(x_spec, spec), out_specs=out_spec, check_vma=False
    )(x, before(base["w"]))


@pytest.mark.parametrize(
    "spec, inner, before, whole_first, form",
    [
        (P("m", None), lambda x, w: jax.lax.psum(x @ w, "m"), lambda w: w, False, lora.NF4()),
        (P(None, "m"), lambda x, w: x @ w, lambda w: w, False, lora.NF4()),
        (P("m", "n"), lambda x, w: jax.lax.psum(x @ w, "m"), lambda w: w.astype(jnp.float32), False, lora.NF4()),
        (P(("m", "n"), None), lambda x, w: jax.lax.psum(x @ w, ("m", "n")), lambda w: w, False, lora.NF4()),
        (P("m", None), lambda x, w: jax.lax.psum(x @ w, "m"), lambda w: w * 2.0, True, lora.NF4()),
        (P("m", None), lambda x, w: jax.lax.psum(x @ w, "m"), lambda w: w, False, lora.Q8_0()),
        (P(("m", "n"), None), lambda x, w: jax.lax.psum(x @ w, ("m", "n")), lambda w: w, False, lora.Q4_1()),
        (P("n", "m"), lambda x, w: jax.lax.psum(x @ w, "n"), lambda w: w, False, lora.Q4_K()),
        (P("m", None), lambda x, w: jax.lax.psum(x @ w, "m"), lambda w: w, True, lora.Q4_K()),
    ],
    ids=["in", "out", "both", "in_both", "scaled_before", "in_Q8_0", "in_both_Q4_1", "both_Q4_K", "cut_Q4_K"],
)
def test_shards_of_codes_in_shard_map(mesh, spec, inner, before, whole_first, form):
    fn = sharded(mesh, spec, inner, before)
    base = quantize({"w": WEIGHT}, {"w": form}, fn, X)
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(4, init="orthogonal")}, fn, X)
    adapted = lora.adapt(fn)
    train, frozen = lora.partition(jax.tree.map(lambda leaf: leaf + 0.05, delta))
    loss = lambda train, base: jnp.sum(jnp.sin(adapted(base, lora.join(train, frozen), X)))  # noqa: E731
    expected, gradients = jax.grad(loss)(train, lora.dequantize(base)), jax.jit(jax.grad(loss))(train, base)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    explained = lora.explain(fn, base, delta, X)
    assert explained.factored and ("dequantized as a whole before shard_map" in str(explained)) == whole_first


def test_parts_that_cut_blocks_are_dequantized_before_shard_map(mesh):
    fn = sharded(mesh, P("m", None), lambda x, w: jax.lax.psum(x @ w, "m"))
    base, x = lora.quantize({"w": WEIGHT[:96]}, {"w": lora.NF4()}, fn, X[:, :96]), X[:, :96]
    np.testing.assert_allclose(lora.adapt(fn)(base, {}, x), x @ base["w"].dequantize(), rtol=1e-4, atol=1e-5)
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(4)}, fn, x)
    assert "a shard is no whole number of blocks" in str(lora.explain(fn, base, delta, x))
