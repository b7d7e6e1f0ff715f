"""Scaled, combined and truncated deltas; PEFT's combinations where PEFT has the method."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import merging
from lora_jax.adapters.lowrank import LoRAAdapter

FIXTURE = np.load(pathlib.Path(__file__).parent / "fixtures" / "adapters" / "combinations.npz")
RANKS = {"one": 3, "two": 3, "three": 2}
ALPHAS = {"one": 5, "two": 2, "three": 4}
WEIGHTS = {"plain": (0.7, 0.5), "negative": (1.2, -0.4)}
ELEMENTWISE = ("linear", "ties", "magnitude_prune")


def of_fixture(name):
    """PEFT's adapter in this library's orientation."""

    def node(module):
        scale = jnp.float32(ALPHAS[name] / RANKS[name])
        a, b = (jnp.asarray(FIXTURE[f"{name}.{module}.{part}"]) for part in "ab")
        return LoRAAdapter(a=a, b=b.T, scale=scale, dropout=jnp.float32(0), axes=("in", "out"), blocks=(True,))

    return {"up": node("up"), "embed": node("embed")}


def added(node):
    """ΔW."""
    return np.asarray(node.merge(jnp.zeros(node.shape())))


def make(seed, rank=2, shape=(6, 8), axes=("in", "out"), alpha=3.0, **options):
    base = {"w": jnp.zeros(shape)}
    recipe = lora.LoRA(rank, alpha=alpha, axes=axes, init="gaussian", **options)
    delta = lora.init(jax.random.key(seed), base, {"w": recipe})
    b = jax.random.normal(jax.random.key(100 + seed), delta["w"].b.shape)
    return {
        "w": jax.tree.unflatten(jax.tree.structure(delta["w"]), [delta["w"].a, b, *jax.tree.leaves(delta["w"])[2:]])
    }


@pytest.mark.parametrize("sign", WEIGHTS)
@pytest.mark.parametrize("method", ["cat", *ELEMENTWISE, "svd", "ties_svd", "magnitude_prune_svd"])
def test_combinations_are_pefts(method, sign):
    pair = ("one", "two") if method in ELEMENTWISE else ("one", "three")
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.5}
    if method.endswith("svd"):
        options["rank"] = 2
    if "ties" in method:
        options["majority"] = "frequency" if sign == "negative" else "total"
    combined = merging.combine([of_fixture(name) for name in pair], WEIGHTS[sign], method=method, **options)
    for module in ("up", "embed"):
        expected = FIXTURE[f"{sign}.{method}.{module}"]
        expected = expected if module == "embed" else expected.T
        np.testing.assert_allclose(added(combined[module]), expected, rtol=1e-4, atol=2e-5)


FORMS = {
    "matrix": {},
    "layers": {"shape": (3, 6, 8), "axes": ("batch", "in", "out")},
    "heads": {"shape": (6, 2, 4), "axes": ("in", "out", "out")},
    "blocks": {"blocks": (True, False)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_cat_is_the_weighted_sum(form):
    one, two = make(1, 2, **form), make(2, 1, alpha=5.0, **form)
    combined = merging.combine([one, two], [0.5, -2.0])
    assert combined["w"].rank == 3
    np.testing.assert_allclose(
        added(combined["w"]), 0.5 * added(one["w"]) - 2.0 * added(two["w"]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_truncation_is_the_nearest(form):
    delta = make(1, 3, **form)
    np.testing.assert_allclose(added(merging.truncate(delta, 3)["w"]), added(delta["w"]), rtol=1e-5, atol=1e-5)
    cut = merging.truncate(delta, 1)["w"]
    assert cut.rank == 1
    node = delta["w"]
    lead = node.axes.count("batch")
    whole, near = (np.asarray(added(x)).reshape(*node.shape()[:lead], 6, 8) for x in (node, cut))
    # By Eckart and Young what is lost is the other singular values; a block is a matrix of its own.
    parts = [whole[..., :4]] if len(node.blocks) > 1 else [whole]
    lost = sum((np.linalg.svd(part, compute_uv=False)[..., 1:] ** 2).sum() for part in parts)
    np.testing.assert_allclose(((whole - near) ** 2).sum(), lost, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_threshold_truncates_all_adapters(form):
    delta = {"small": merging.scale(make(1, 3, **form), 0.5)["w"], "large": make(2, 4, **form)["w"]}
    values = {path: parts.values for path, parts in lora.analysis.decompose(delta).items()}
    every = np.sort(np.concatenate([array.ravel() for array in values.values()]))[::-1]
    threshold = every[len(every) // 2]
    energy = (every[every >= threshold] ** 2).sum() / (every**2).sum()
    cut = merging.truncate(delta, energy=float(energy) * (1 - 1e-6))
    for path, node in cut.items():
        keep = values[path] > 0.999 * threshold
        assert node.rank == keep.sum(axis=-1).max()
        lost = (values[path][~keep] ** 2).sum()
        np.testing.assert_allclose(merging.distance(delta[path], node) ** 2, lost, rtol=1e-3, atol=1e-5)
    assert set(cut) == {path for path, array in values.items() if (array > 0.999 * threshold).any()}
    whole = merging.truncate(delta, energy=1)
    for path, node in whole.items():
        np.testing.assert_allclose(added(node), added(delta[path]), rtol=1e-5, atol=1e-5)


def test_truncation_to_energy_omits_adapters_without_a_large_value():
    delta = {"w": make(1, 3)["w"], "zero": merging.scale(make(2, 3), 1e-6)["w"]}
    assert list(merging.truncate(delta, energy=0.9)) == ["w"]
    untrained = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))})
    assert merging.truncate(untrained, energy=0.9) == {}
    full = {"head": lora.Full().create(jax.random.key(0), jnp.ones((4, 3)), None)}
    assert merging.truncate(full, energy=0.5) == full


def test_truncation_needs_a_rank_or_an_energy():
    delta = make(1, 3)
    for arguments in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(TypeError, match="either rank or energy"):
            merging.truncate(delta, **arguments)
    for energy in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            merging.truncate(delta, energy=energy)
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda delta: merging.truncate(delta, energy=0.5))(delta)
    dora = lora.init(jax.random.key(0), {"w": jnp.ones((6, 8))}, {"w": lora.DoRA(2, axes=("in", "out"))})
    with pytest.raises(ValueError, match=r"'w': what a DoRA adapter does .* cannot be truncated"):
        merging.truncate(dora, energy=0.5)


def test_the_svd_of_all_ranks_is_the_sum():
    one, two = make(1, 2), make(2, 3)
    combined = merging.combine([one, two], [1.0, -1.0], method="svd", rank=5)
    np.testing.assert_allclose(merging.norm(combined["w"]), merging.distance(one["w"], two["w"]), rtol=1e-5)


@pytest.mark.parametrize("method", merging.METHODS)
def test_every_method_preserves_a_single_adapter(method):
    delta = make(1)
    alone = merging.combine([delta], [1.0], method=method, density=1.0, key=jax.random.key(0))
    np.testing.assert_allclose(added(alone["w"]), added(delta["w"]), rtol=2e-5, atol=2e-5)


def test_scaling_and_negating():
    delta = make(1)
    np.testing.assert_allclose(added(merging.scale(delta, -2.0)["w"]), -2.0 * added(delta["w"]), rtol=1e-6)
    gone = merging.combine([delta, merging.scale(delta, -1.0)], [1.0, 1.0])
    np.testing.assert_allclose(added(gone["w"]), 0.0, atol=1e-5)


def test_deltas_on_different_weights():
    one, two = make(1), {"v": make(2)["w"]}
    combined = merging.combine([one, two], [1.0, 0.5])
    np.testing.assert_allclose(added(combined["w"]), added(one["w"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(added(combined["v"]), 0.5 * added(two["v"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_linear_svd"])
def test_dare_is_unbiased(method):
    delta = make(1, 6)

    @jax.jit
    @jax.vmap
    def draw(key):
        combined = merging.combine([delta], [1.0], method=method, density=0.5, rank=6, key=key)
        return combined["w"].merge(jnp.zeros((6, 8)))

    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 1000)))
    # Independent masks on a and b: the mean of the products is the product of the means.
    assert np.abs(drawn.mean(axis=0) - added(delta["w"])).mean() < 0.1 * np.abs(added(delta["w"])).mean()
    assert not np.allclose(drawn[0], drawn[1])


def test_offsets_add():
    base = {"b": jnp.zeros(3)}
    delta = lora.init(jax.random.key(0), base, {"b": lora.Offset(2.0)})
    delta = jax.tree.map(lambda x: x + 1, delta)  # value 1, scale 3
    combined = merging.combine([delta, delta], [1.0, -0.5], method="linear")
    np.testing.assert_allclose(lora.merge(base, combined)["b"], 1.5)


def test_what_cannot_be_combined():
    one = make(1)
    with pytest.raises(ValueError, match="'w': the Full adapter"):
        merging.scale({"w": lora.Full().create(jax.random.key(0), jnp.ones(3), ())}, 2.0)
    with pytest.raises(ValueError, match="equal rank"):
        merging.combine([one, make(2, 3)], [1.0, 1.0], method="linear")
    with pytest.raises(ValueError, match="different kinds, shapes"):
        merging.combine([one, make(2, shape=(5, 8))], [1.0, 1.0])
    with pytest.raises(ValueError, match="'cat', 'linear'"):
        merging.combine([one], [1.0], method="mean")
    with pytest.raises(ValueError, match="2 deltas and 1 weights"):
        merging.combine([one, one], [1.0])
    with pytest.raises(ValueError, match="density"):
        merging.combine([one], [1.0], method="ties")
    with pytest.raises(ValueError, match="give key="):
        merging.combine([one], [1.0], method="dare_ties", density=0.5)
    with pytest.raises(ValueError, match="positive integer"):
        merging.truncate(one, 0)


FAMILIES = {
    "LoRA-FA": lora.LoRAFA(2, alpha=3),
    "AdaLoRA": lora.AdaLoRA(3, alpha=3),
    "AdaLoRA in blocks": lora.AdaLoRA(2, alpha=3, blocks=(False, True)),
    "VeRA": lora.VeRA(5),
    "LoHa": lora.LoHa(2, alpha=3),
}


def moved(node, seed):
    """The adapter with every trained leaf another."""
    train, frozen = lora.partition({"w": node})
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.5 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)]
    return lora.join(treedef.unflatten(leaves), frozen)["w"]


@pytest.mark.parametrize(
    "shape, axes", [((6, 8), ("in", "out")), ((4, 3, 8, 2), ("out", "in", "batch", "in"))], ids=str
)
@pytest.mark.parametrize("recipe", FAMILIES.values(), ids=FAMILIES)
def test_terms_of_other_families_become_low_rank(recipe, shape, axes):
    weight = jnp.zeros(shape)
    node = moved(recipe.create(jax.random.key(0), weight, axes), 1)
    other = moved(lora.LoRA(2, alpha=5).create(jax.random.key(2), weight, axes), 3)
    close = {"rtol": 1e-5, "atol": 1e-5}
    if node.rank > 1:
        truncated = merging.truncate({"w": node}, 1)["w"]
        assert type(truncated) is LoRAAdapter and truncated.rank == 1
        truncated = merging.truncate({"w": node}, node.rank**2)["w"]
        np.testing.assert_allclose(added(truncated), added(node), **close)
    np.testing.assert_allclose(added(merging.scale({"w": node}, -2.0)["w"]), -2 * added(node), **close)
    if "blocks" in str(recipe) and recipe.blocks != 1:
        with pytest.raises(ValueError, match="different kinds, shapes, axes or blocks"):
            merging.combine([{"w": node}, {"w": other}], [2.0, -0.5])
        other = node
    combined = merging.combine([{"w": node}, {"w": other}], [2.0, -0.5])["w"]
    np.testing.assert_allclose(added(combined), 2 * added(node) - 0.5 * added(other), **close)


def test_a_term_that_is_no_product_of_two_factors_is_not_combined():
    delta = lora.init(jax.random.key(0), {"w": jnp.zeros((6, 8))}, {"w": lora.LoKr(1, axes=("in", "out"))})
    with pytest.raises(ValueError, match=r"'w': the change that a LoKr(.full)? adapter makes .* is no product of two"):
        merging.combine([delta], [1.0])
    with pytest.raises(ValueError, match=r"'w': what a LoKr(.full)? adapter does .* cannot be brought to rank 1"):
        merging.truncate(delta, 1)
    weight = {"w": jnp.ones((6, 8))}
    dora = lora.init(jax.random.key(0), weight, {"w": lora.DoRA(2, axes=("in", "out"))})
    with pytest.raises(ValueError, match=r"'w': what a DoRA adapter does .* cannot be brought to rank 1"):
        merging.truncate(dora, 1)
    assert merging.truncate(dora, 2) == dora
    gains = lora.init(jax.random.key(0), weight, {"w": lora.IA3(axes=("in", "out"))})
    assert merging.truncate(gains, 1) == gains


def test_the_order_of_deltas_decides_no_dtype():
    narrow = make(1, dtype=jnp.bfloat16)
    for pair in ([narrow, make(2)], [make(2), narrow]):
        assert merging.combine(pair, [1.0, 1.0])["w"].a.dtype == jnp.float32
