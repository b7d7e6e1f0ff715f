"""The subspaces of intrinsic dimension: the transform, the delta at given coordinates, training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import hadamard

import lora_jax as lora
from experiments.baselines import intrinsic

BASE = {
    "layers": {name: {"kernel": jnp.full((6, 7), 0.5), "bias": jnp.zeros(7)} for name in ("0", "1")},
    "head": jnp.ones((7, 3)),
}


def apply_fn(params, x):
    for layer in params["layers"].values():
        x = jnp.tanh(x[:, :6] @ layer["kernel"] + layer["bias"][None])
    return x @ params["head"]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128, 4096])
def test_the_fast_product_is_that_with_the_hadamard_matrix(size):
    x = jax.random.normal(jax.random.key(size), (2, size))
    np.testing.assert_allclose(intrinsic._hadamard(x), np.asarray(x) @ hadamard(size), rtol=1e-3, atol=1e-3)


def test_the_weights_are_a_linear_function_of_the_coordinates():
    entry = intrinsic.init(jax.random.key(0), BASE, 5)

    def change(z):
        return flat(lora.merge(BASE, intrinsic.delta(entry | {"z": z}, BASE))) - flat(BASE)

    z = jax.random.normal(jax.random.key(1), (5,))
    columns = np.stack([change(row) for row in jnp.eye(5)])
    np.testing.assert_allclose(change(z), np.asarray(z) @ columns, atol=1e-5)
    assert not np.any(change(jnp.zeros(5)))
    assert np.linalg.matrix_rank(columns, tol=1e-3) == 5
    weights = sum(leaf.size for leaf in jax.tree.leaves(BASE))
    np.testing.assert_allclose(np.linalg.norm(columns, axis=1), 1, rtol=0.3)
    np.testing.assert_allclose(columns @ columns.T, np.eye(5), atol=0.4)  # nearly orthogonal
    stored = sum(leaf.size for leaf in jax.tree.leaves(entry["projection"]))
    assert stored < 2 * weights  # linear in the weights, whatever the dimension


def test_layers_have_scales():
    entry = intrinsic.init(jax.random.key(0), BASE, 8, layers=True)
    assert entry["z"].shape == (5,) and entry["scales"].shape == (3,)  # two layers, and the rest
    moved = entry | {"z": jnp.ones(5), "scales": jnp.array([1.0, 0.0, 2.0])}
    delta = intrinsic.delta(moved, BASE)
    sizes = {path: float(jnp.abs(node.merge(jnp.zeros(node.value.shape))).max()) for path, node in delta.items()}
    fixed = [path for path, size in sizes.items() if size == 0]
    assert len({path.split("/")[1] if "layers" in path else path for path in fixed}) == 1


@pytest.mark.usefixtures("lenient")  # optax's Adam promotes: a float to the power of an integer
def test_a_subspace_trains_as_other_leaves_do():
    base = BASE | {"intrinsic": intrinsic.init(jax.random.key(0), BASE, 6, layers=True)}
    apply = intrinsic.adapt(apply_fn)
    x, y = jax.random.normal(jax.random.key(1), (8, 6)), jnp.ones((8, 3))
    np.testing.assert_array_equal(apply(base, x), apply_fn(BASE, x))
    delta = lora.init(jax.random.key(2), base, {intrinsic.TRAINED: lora.Full()}, apply, x)
    assert sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])) == 6
    adapted, tx = lora.adapt(apply), optax.adam(0.1)
    step = lora.train_step(lambda base, delta, batch, key: jnp.mean((adapted(base, delta, batch) - y) ** 2), tx)
    state, losses = lora.TrainState.create(base, delta, tx, jax.random.key(3)), []
    for _ in range(20):
        state, metrics = step(state, x)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    entry = lora.merge(base, state.delta)["intrinsic"]
    params = lora.merge(BASE, intrinsic.delta(entry, BASE))
    np.testing.assert_allclose(apply_fn(params, x), adapted(base, state.delta, x), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="matches no path"):
        intrinsic.init(jax.random.key(0), BASE, 5, pattern="hed$")
    with pytest.raises(ValueError, match="more than the 3 scales"):
        intrinsic.init(jax.random.key(0), BASE, 3, layers=True)
