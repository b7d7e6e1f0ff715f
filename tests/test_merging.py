"""merge(), unmerge(), switch_task()."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.merging import distance, norm


@pytest.fixture
def base(getkey):
    return {"w": jax.random.normal(getkey(), (6, 8)), "t": jax.random.normal(getkey(), (5, 3)), "n": jnp.ones(3)}


def make(base, key, spec):
    delta = lora.init(key, base, spec)
    train, frozen = lora.partition(delta)
    return lora.join(jax.tree.map(lambda leaf: leaf + 0.5 * jnp.cos(leaf), train), frozen)


LOW = {"w": lora.LoRA(2, alpha=3, axes=("in", "out"))}
ALL = LOW | {"t": lora.Rows((1, 4), axes=("in", "out")), "n": lora.Full()}


def test_merge_is_the_formula(base, getkey):
    delta = make(base, getkey(), LOW)
    node = delta["w"]
    expected = np.asarray(base["w"]) + 1.5 * np.einsum("ri,ro->io", node.a, node.b)
    merged = lora.merge(base, delta)
    chex.assert_trees_all_close(merged["w"], expected.astype(np.float32), rtol=1e-6)
    # What is not named is the same array; the base is as it was.
    assert merged["t"] is base["t"] and not base["w"].is_deleted()


def test_rows_and_full_replace(base, getkey):
    delta = make(base, getkey(), ALL)
    merged = lora.merge(base, delta)
    np.testing.assert_array_equal(merged["t"][jnp.asarray([1, 4])], delta["t"].rows)
    np.testing.assert_array_equal(merged["t"][0], base["t"][0])
    np.testing.assert_array_equal(merged["n"], delta["n"].value)


def test_merge_in_float32_then_cast(getkey):
    base = {"w": jax.random.normal(getkey(), (64, 64), jnp.bfloat16)}
    delta = make(base, getkey(), LOW)
    exact = base["w"].astype(jnp.float32) + 1.5 * jnp.einsum("ri,ro->io", delta["w"].a, delta["w"].b)
    np.testing.assert_array_equal(lora.merge(base, delta)["w"], exact.astype(jnp.bfloat16))


def test_order_of_merging_does_not_matter(base, getkey):
    one, two = make(base, getkey(), LOW), make(base, getkey(), LOW)
    chex.assert_trees_all_close(
        lora.merge(lora.merge(base, one), two), lora.merge(lora.merge(base, two), one), rtol=1e-5, atol=1e-6
    )


def test_unmerge_restores(base, getkey):
    delta = make(base, getkey(), LOW)
    merged = lora.merge(base, delta)
    chex.assert_trees_all_close(lora.unmerge(merged, delta), base, rtol=1e-6, atol=1e-6)
    delta = make(base, getkey(), ALL)
    chex.assert_trees_all_equal(lora.unmerge(lora.merge(base, delta), delta, base), base)


def test_merging_twice_adds_twice_and_merging_nothing_adds_nothing(base, getkey):
    delta = make(base, getkey(), LOW)
    once = lora.merge(base, delta)
    chex.assert_trees_all_close(lora.unmerge(lora.merge(once, delta), delta), once, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(lora.merge(base, {}), base)


@pytest.mark.parametrize("spec", [{"t": ALL["t"]}, {"n": ALL["n"]}])
def test_unmerge_without_base_refuses_replacements(base, spec, getkey):
    delta = make(base, getkey(), spec)
    (path,) = delta
    with pytest.raises(ValueError, match=rf"{delta[path].kind} adapter of '{path}'.*base="):
        lora.unmerge(lora.merge(base, delta), delta)
    with pytest.raises(ValueError, match="switch_task without base"):
        lora.switch_task(lora.merge(base, delta), delta, {})


def test_switch_task(base, getkey):
    old, new = make(base, getkey(), LOW), make(base, getkey(), ALL)
    at_old, at_new = lora.merge(base, old), lora.merge(base, new)
    chex.assert_trees_all_close(lora.switch_task(at_old, old, new), at_new, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(lora.switch_task(at_old, old, new, base), at_new)
    chex.assert_trees_all_equal(lora.switch_task(at_new, new, old, base), at_old)


def test_structure_dtypes_and_shardings_are_kept(getkey):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    base = {"w": jax.device_put(jax.random.normal(getkey(), (16, 8), jnp.bfloat16), sharding)}
    merged = lora.merge(base, make(base, getkey(), LOW))
    assert merged["w"].sharding == sharding and merged["w"].dtype == jnp.bfloat16


def test_merge_under_jit(base, getkey):
    delta = make(base, getkey(), ALL)
    chex.assert_trees_all_close(jax.jit(lora.merge)(base, delta), lora.merge(base, delta), rtol=1e-6)


def test_a_merge_that_would_write_nan_is_refused(base, getkey):
    delta = make(base, getkey(), LOW)
    for bad in (jnp.nan, jnp.inf):
        broken = {"w": dataclasses.replace(delta["w"], a=delta["w"].a.at[0, 0].set(bad))}
        with pytest.raises(ValueError, match="'w' is not finite"):
            lora.merge(base, broken)


def test_a_delta_of_another_base_is_refused(base, getkey):
    delta = make(base, getkey(), LOW)
    with pytest.raises(ValueError, match=r"'w' is for a weight of shape \(6, 8\); the base has \(6, 9\)"):
        lora.merge({"w": jnp.ones((6, 9))}, delta)
    with pytest.raises(ValueError, match=r"'w', which is not in the base; nearest: 'v'"):
        lora.unmerge({"v": jnp.ones((6, 8))}, delta)


# norm and distance.

SHAPED = {
    "matrix": ((6, 8), ("in", "out"), {}),
    "the other way round": ((8, 6), ("out", "in"), {}),
    "stacked": ((3, 6, 8), ("batch", "in", "out"), {}),
    "window": ((3, 2, 8), ("in", "in", "out"), {}),
    "heads": ((6, 2, 4), ("in", "out", "out"), {}),
    "blocks": ((6, 8), ("in", "out"), {"blocks": 2}),
    "some blocks": ((6, 12), ("in", "out"), {"blocks": (True, False, True)}),
    "stacked blocks": ((3, 6, 8), ("batch", "in", "out"), {"blocks": 2}),
}


def low_rank(key, shape, axes, rank=2, **options):
    recipe = lora.LoRA(rank, alpha=3, axes=axes, init="gaussian", **options)
    return make({"w": jnp.zeros(shape)}, key, {"w": recipe})["w"]


def change(node):
    return np.asarray(node.merge(jnp.zeros(node.shape())), np.float64)


@pytest.mark.parametrize("name", SHAPED)
def test_norm_is_that_of_the_change(name, getkey):
    shape, axes, options = SHAPED[name]
    node = low_rank(getkey(), shape, axes, **options)
    assert norm(node) == pytest.approx(np.linalg.norm(change(node)), rel=1e-5)


@pytest.mark.parametrize("name", ["matrix", "stacked", "some blocks"])
def test_distance_is_that_of_the_changes(name, getkey):
    shape, axes, options = SHAPED[name]
    one, other = low_rank(getkey(), shape, axes, **options), low_rank(getkey(), shape, axes, rank=1, **options)
    assert distance(one, other) == pytest.approx(np.linalg.norm(change(one) - change(other)), rel=1e-5)
    assert distance(one, other, sign=1.0) == pytest.approx(np.linalg.norm(change(one) + change(other)), rel=1e-5)
    assert distance(one, one) == pytest.approx(0, abs=1e-6 * norm(one))


def test_a_scale_for_each_layer_counts(getkey):
    node = low_rank(getkey(), (3, 6, 8), ("batch", "in", "out"))
    node = dataclasses.replace(node, scale=jnp.asarray([0.0, 1.0, 2.0]))
    assert norm(node) == pytest.approx(np.linalg.norm(change(node)), rel=1e-5)
    assert norm(dataclasses.replace(node, b=0 * node.b)) == 0.0


def test_distance_of_adapters_for_different_weights(getkey):
    one = low_rank(getkey(), (6, 8), ("in", "out"))
    for shape, axes in (((6, 9), ("in", "out")), ((6, 8), ("out", "in"))):
        with pytest.raises(ValueError, match="different weights"):
            distance(one, low_rank(getkey(), shape, axes))


FAMILIES = {
    "AdaLoRA": lora.AdaLoRA(2, alpha=3),
    "LoRAFA": lora.LoRAFA(2, alpha=3),
    "LoHa": lora.LoHa(2, alpha=3),
    "LoHa of a high rank": lora.LoHa(4, alpha=3),
    "LoKr": lora.LoKr(1, alpha=3),
    "LoKr, full": lora.LoKr(8, alpha=3),
    "VeRA": lora.VeRA(5),
    "Offset": lora.Offset(2.0),
}


@pytest.mark.parametrize("recipe", FAMILIES.values(), ids=FAMILIES)
def test_terms_of_every_family_are_measured(recipe, getkey):
    node = recipe.create(getkey(), jnp.zeros((6, 3, 8)), ("in", "batch", "out"))
    train, frozen = lora.partition({"w": node})
    one, other = (
        lora.join(jax.tree.map(lambda leaf, by=by: leaf + by * jnp.cos(leaf), train), frozen)["w"] for by in (0.5, -0.3)
    )
    assert norm(one) == pytest.approx(np.linalg.norm(change(one)), rel=1e-5)
    assert distance(one, other) == pytest.approx(np.linalg.norm(change(one) - change(other)), rel=1e-5)
    low = low_rank(getkey(), (6, 3, 8), ("in", "batch", "out"))
    if one.axes:
        assert distance(one, low) == pytest.approx(np.linalg.norm(change(one) - change(low)), rel=1e-5)


@pytest.mark.parametrize("recipe", [lora.IA3(), lora.Full(), lora.DVoRA(2)], ids=lambda recipe: type(recipe).__name__)
def test_an_adapter_that_is_not_additive_has_no_norm(recipe, getkey):
    node = recipe.create(getkey(), jnp.ones((6, 8)), ("in", "out"))
    with pytest.raises(ValueError, match="is not additive, so it has no term"):
        norm(node)
