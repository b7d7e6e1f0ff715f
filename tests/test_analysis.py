"""Analysis of deltas against the same quantities from ΔW itself, by definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.cases import moved

import lora_jax as lora
from lora_jax import analysis

AXES = {"flat": ("in", "out"), "heads": ("out", "in", "out"), "layers": ("batch", "in", "out")}
SHAPES = {"flat": (6, 8), "heads": (2, 6, 4), "layers": (3, 6, 8)}


def matrices(weight, axes):
    """`[batch, in, out]`, written out case by case."""
    weight = np.asarray(weight, np.float64)
    if axes == ("batch", "in", "out"):
        return weight
    return (weight if axes == ("in", "out") else weight.transpose(1, 0, 2).reshape(6, 8))[None]


def make_problem(recipe, layout="flat", seed=0):
    base = {"w": jax.random.normal(jax.random.key(1), SHAPES[layout])}
    return base, moved(lora.init(jax.random.key(seed), base, {"w": recipe}), seed + 5)


RECIPES = {
    "LoRA": lambda axes: lora.LoRA(2, alpha=3, axes=axes),
    "AdaLoRA": lambda axes: lora.AdaLoRA(3, alpha=2, axes=axes),
    "LoRAFA": lambda axes: lora.LoRAFA(2, alpha=3, axes=axes),
    "VeRA": lambda axes: lora.VeRA(4, axes=axes),
    "LoHa": lambda axes: lora.LoHa(2, axes=axes),
    "DoRA": lambda axes: lora.DoRA(2, alpha=3, axes=axes),
    "IA3": lambda axes: lora.IA3(axes=axes),
    "Full": lambda axes: lora.Full(),
}


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        *((recipe, "layers") for recipe in RECIPES),
        *(("LoRA", layout) for layout in ("flat", "heads")),
        *((recipe, "heads") for recipe in ("VeRA", "DoRA", "Full")),
    ],
)
def test_decompositions_are_those_of_the_change(recipe, layout, lenient):
    axes = AXES[layout]
    base, delta = make_problem(RECIPES[recipe](axes), layout)
    result = analysis.decompose(delta, base, axes={"w": axes})["w"]
    change = matrices(lora.merge(base, delta)["w"], axes) - matrices(base["w"], axes)
    if layout != "layers":
        result = analysis.Decomposition(result.inputs[None], result.values[None], result.outputs[None])
    k = result.values.shape[-1]
    np.testing.assert_allclose(result.values, np.linalg.svd(change, compute_uv=False)[:, :k], rtol=1e-4, atol=1e-5)
    again = result.inputs * result.values[:, None, :] @ result.outputs.swapaxes(1, 2)
    np.testing.assert_allclose(again, change, atol=1e-5)
    whole = analysis.decompose_weights(base, delta, axes={"w": axes})["w"]
    expected = np.linalg.svd(matrices(base["w"], axes), compute_uv=False)
    np.testing.assert_allclose(whole.values.reshape(expected.shape), expected, rtol=1e-5)


def test_a_change_that_factors_is_not_formed(monkeypatch):
    _, delta = make_problem(lora.LoRA(2, axes=("in", "out")))
    monkeypatch.setattr(type(delta["w"]), "merge", lambda *args: pytest.fail("merged"))
    result = analysis.decompose(delta)["w"]
    assert result.inputs.shape == (6, 2) and result.outputs.shape == (8, 2)
    np.testing.assert_allclose(np.linalg.norm(result.values), lora.merging.norm(delta["w"]), rtol=1e-12)


def test_blocks_are_matrices_of_their_own():
    base, delta = make_problem(lora.LoRA(2, blocks=(True, False), axes=("in", "out")))
    result = analysis.decompose(delta)["w"]
    assert result.values.shape == (2, 2) and (result.values[1] == 0).all() and (result.outputs[1] == 0).all()
    change = np.asarray(lora.merge(base, delta)["w"] - base["w"])
    np.testing.assert_allclose(result.values[0], np.linalg.svd(change[:, :4], compute_uv=False)[:2], rtol=1e-4)
    assert analysis.decompose_weights(base, delta)["w"].values.shape == (2, 4)
    amplified = analysis.amplification(delta, base)["w"]
    assert amplified.factor[0] > 0 and np.isnan(amplified.factor[1])
    assert analysis.drift(delta, base)["w"].direction[1] < 1e-12


def phi(one, other, i, j):
    """The paper's definition, from the right-singular vectors of two (rank, in) matrices."""
    u, v = (np.linalg.svd(np.asarray(a, np.float64))[2][:n].T for a, n in ((one, i), (other, j)))
    return np.linalg.norm(u.T @ v) ** 2 / min(i, j)


def test_similarity_is_the_papers():
    (_, one), (_, other) = (
        make_problem(lora.LoRA(2, axes=("in", "out"))),
        make_problem(lora.LoRA(4, axes=("in", "out")), seed=1),
    )
    grid = analysis.similarity(analysis.factor_directions(one)["w"], analysis.factor_directions(other)["w"])
    expected = [[phi(one["w"].a, other["w"].a, i, j) for j in range(1, 5)] for i in range(1, 3)]
    np.testing.assert_allclose(grid, expected, rtol=1e-6)
    itself = analysis.similarity(*[analysis.factor_directions(one)["w"]] * 2)
    np.testing.assert_allclose(itself, [[1, 1], [1, 1]], rtol=1e-12)
    # What ΔW reads is what a spans, in another order.
    from_change, from_a = analysis.decompose(one)["w"].inputs, analysis.factor_directions(one)["w"]
    np.testing.assert_allclose(analysis.similarity(from_change, from_a)[-1, -1], 1.0, rtol=1e-12)


def test_similarity_of_layers_and_of_the_weight():
    base, delta = make_problem(lora.LoRA(2, axes=AXES["layers"]), "layers")
    weight, change = analysis.decompose_weights(base, delta)["w"], analysis.decompose(delta)["w"]
    grids = analysis.similarity(weight.inputs, change.inputs)
    assert grids.shape == (3, 6, 2)
    np.testing.assert_allclose(grids[:, -1, -1], 1.0, rtol=1e-12)  # all six directions hold any two
    with pytest.raises(ValueError, match="spaces of different sizes, 6 and 8"):
        analysis.similarity(weight.inputs, weight.outputs)
    with pytest.raises(ValueError, match="'w': the Full adapter has no factor a"):
        analysis.factor_directions(make_problem(lora.Full())[1])


def test_amplification_is_table_7():
    base, delta = make_problem(lora.LoRA(2, alpha=5, axes=("in", "out")))
    result = analysis.amplification(delta, base)["w"]
    weight = np.asarray(base["w"], np.float64)
    change = np.asarray(lora.merge(base, delta)["w"], np.float64) - weight
    u, s, vt = np.linalg.svd(change)
    projected = np.linalg.norm(u[:, :2].T @ weight @ vt[:2].T)
    np.testing.assert_allclose(result.factor, np.linalg.norm(s[:2]) / projected, rtol=1e-5)
    np.testing.assert_allclose(result.unscaled_factor, result.factor / 2.5, rtol=1e-12)
    np.testing.assert_allclose(result.weight, np.linalg.norm(weight), rtol=1e-12)
    np.testing.assert_allclose(result.largest, np.linalg.norm(np.linalg.svd(weight)[1][:2]), rtol=1e-12)
    assert result.random < result.largest
    rng, draws = np.random.default_rng(0), []
    for _ in range(400):
        p, q = (np.linalg.qr(rng.normal(size=(n, 2)))[0] for n in weight.shape)
        draws.append(np.linalg.norm(p.T @ weight @ q) ** 2)
    np.testing.assert_allclose(result.random, np.sqrt(np.mean(draws)), rtol=0.05)


def test_amplification_leaves_out_pruned_and_further_directions():
    base, delta = make_problem(lora.AdaLoRA(3, axes=("in", "out")))
    pruned = {"w": dataclasses.replace(delta["w"], values=delta["w"].values.at[1:].set(0.0))}
    one = analysis.amplification(pruned, base)["w"]
    u, v = (np.asarray(x, np.float64) for x in (delta["w"].a[0], delta["w"].b[0]))
    expected = abs(u @ np.asarray(base["w"], np.float64) @ v) / np.linalg.norm(u) / np.linalg.norm(v)
    np.testing.assert_allclose(one.projected, expected, rtol=1e-6)
    full = make_problem(lora.Full())
    all_of_it = analysis.amplification(full[1], full[0], axes={"w": ("in", "out")})["w"]
    np.testing.assert_allclose(all_of_it.largest, all_of_it.weight, rtol=1e-12)
    assert all_of_it.projected < all_of_it.largest  # six of the eight outputs' directions
    top = analysis.amplification(full[1], full[0], rank=1, axes={"w": ("in", "out")})["w"]
    assert top.projected < top.largest < all_of_it.weight and top.change < all_of_it.change


@pytest.mark.parametrize("recipe", ["LoRA", "DoRA", "Full"])
def test_drift_is_the_papers(recipe, lenient):
    for layout in ("heads", "layers"):
        axes = AXES[layout]
        base, delta = make_problem(RECIPES[recipe](axes), layout)
        result = analysis.drift(delta, base, axes={"w": axes})["w"]
        before, after = matrices(base["w"], axes), matrices(lora.merge(base, delta)["w"], axes)
        magnitudes, directions = [], []
        for old, new in zip(before, after):
            pairs = list(zip(old.T, new.T))
            magnitudes.append(np.mean([abs(np.linalg.norm(y) - np.linalg.norm(x)) for x, y in pairs]))
            cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
            directions.append(np.mean([1 - cosine for cosine in cosines]))
        np.testing.assert_allclose(result.magnitude.ravel(), magnitudes, rtol=1e-4)
        np.testing.assert_allclose(result.direction.ravel(), directions, rtol=1e-4)


def test_magnitudes_and_directions_apart():
    base = {"w": jnp.array([[3.0, 0.0, 0.0], [4.0, 1.0, 0.0]])}  # the last output's vector is zero
    turned = {"w": jnp.array([[-4.0, 0.0, 0.0], [3.0, 3.0, 0.0]])}
    delta = lora.init(jax.random.key(0), turned, {"w": lora.Full()})
    result = analysis.drift(delta, base, axes={"w": ("in", "out")})["w"]
    np.testing.assert_allclose(result.direction, (1 + 0 + 0) / 3, rtol=1e-12)
    np.testing.assert_allclose(result.magnitude, (0 + 2 + 0) / 3, rtol=1e-12)


def test_what_cannot_be_analyzed():
    base, delta = make_problem(lora.Full())
    with pytest.raises(ValueError, match=r"'w': the Full adapter has the axis roles \(\)"):
        analysis.decompose(delta, base)
    with pytest.raises(ValueError, match="pass base="):
        analysis.decompose(delta, axes={"w": ("in", "out")})
    with pytest.raises(ValueError, match="gives 3 roles"):
        analysis.decompose(delta, base, axes={"w": ("batch", "in", "out")})
    with pytest.raises(ValueError, match="which is not in the base; nearest: 'v'"):
        analysis.drift(delta, {"v": base["w"]}, axes={"w": ("in", "out")})
    with pytest.raises(ValueError, match="at least two points, got 1"):
        analysis.correlation([analysis.Drift(np.array(1.0), np.array(0.1))])
    with pytest.raises(ValueError, match="got 0"):
        analysis.correlation([])
