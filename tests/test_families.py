"""The families beside LoRA: PEFT's outputs and gradients, starting values, and what recipes refuse."""

import dataclasses
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import lora_jax as lora

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "adapters"


def linear(base, x):
    return x @ base["weight"].T + base["bias"][None, None]


def conv(base, x):
    y = jax.lax.conv_general_dilated(
        x, base["weight"], (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return y + base["bias"][None, :, None, None]


def embedding(base, x):
    return jnp.take(base["weight"], x, axis=0)


FUNCTIONS = {"linear": linear, "conv2d": conv, "embedding": embedding}


def low_rank(in_shape):
    """a [rank, *in] and b [rank, *out] from PEFT's (rank, in·…) and (out, rank, …)."""
    return {
        "a": lambda a: a.reshape(a.shape[0], *in_shape),
        "b": lambda b: b.reshape(b.shape[0], -1).T,
    }


def families(kind, in_shape):
    """Per case: the recipe and, per leaf, PEFT's name and how its array becomes ours."""
    a, b = low_rank(in_shape).values()
    first, rest = (2, (in_shape[0] // 2, *in_shape[1:]))
    kron = {"c": ("lokr_w1", np.transpose)}
    inner = low_rank(rest)
    lora_names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A", "lora_B")
    assert in_shape[0] % first == 0 or kind == "embedding"
    return {
        "dora": (
            lora.DoRA(3, alpha=5),
            {
                "a": (lora_names[0], a),
                "b": (lora_names[1], b),
                "magnitude": ("lora_magnitude_vector", np.ravel),
            },
        ),
        "vera": (lora.VeRA(5), {"d": ("vera_lambda_d", np.asarray), "g": ("vera_lambda_b", np.asarray)}),
        "loha": (
            lora.LoHa(2, alpha=3),
            {
                "a1": ("hada_w1_b", a),
                "b1": ("hada_w1_a", b),
                "a2": ("hada_w2_b", a),
                "b2": ("hada_w2_a", b),
            },
        ),
        "lokr": (
            lora.LoKr(1, alpha=3),
            kron | {"a": ("lokr_w2_b", inner["a"]), "b": ("lokr_w2_a", inner["b"])},
        ),
        "lokr_full": (lora.LoKr(6, alpha=3), kron | {"d": ("lokr_w2", lambda d: np.moveaxis(d, 0, -1))}),
        "ia3_out": (lora.IA3(), {"gain": ("ia3_l", np.ravel)}),
        "ia3_in": (lora.IA3("in"), {"gain": ("ia3_l", np.ravel)}),
        "oft": (lora.OFT(4), {"q": ("oft_R", np.asarray)}),
        "oft_neumann": (lora.OFT(4, terms=5), {"q": ("oft_R", np.asarray)}),
        "miss": (lora.MiSS(2), {"d": ("miss_block", np.asarray)}),
        "hira": (lora.HiRA(3), {"a": ("hira_A", a), "b": ("hira_B", b)}),
    }


CASES = [
    *(("dora", kind) for kind in FUNCTIONS),
    *((family, kind) for family in ("loha", "lokr", "lokr_full") for kind in ("linear", "conv2d")),
    *((family, "linear") for family in ("vera", "ia3_out", "ia3_in", "oft", "oft_neumann", "miss", "hira")),
]


@pytest.fixture(scope="module")
def stored():
    with np.load(FIXTURES / "families.npz") as file:
        return dict(file)


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
@pytest.mark.parametrize("family, kind", CASES)
def test_outputs_and_gradients_are_pefts(family, kind, merged, stored, getkey):
    prefix = f"{family}.{kind}."
    arrays = {name.removeprefix(prefix): array for name, array in stored.items() if name.startswith(prefix)}
    fn = FUNCTIONS[kind]
    base = {name: jnp.asarray(arrays[name]) for name in ("weight", "bias") if name in arrays}
    x = jnp.asarray(arrays["x"], jnp.int32 if kind == "embedding" else jnp.float32)
    in_shape = arrays["weight"].shape[:1] if kind == "embedding" else arrays["weight"].shape[1:]
    recipe, names = families(kind, in_shape)[family]
    spec = {"weight": recipe}
    if family == "ia3_out":  # PEFT scales the bias too
        spec["bias"] = lora.IA3(axes=("out",))
    delta = lora.init(getkey(), base, spec, fn, x)
    leaves = {name: jnp.asarray(ours(arrays[f"p.{theirs}"])) for name, (theirs, ours) in names.items()}
    node = delta["weight"]
    for name, leaf in leaves.items():
        assert getattr(node, name).shape == leaf.shape, name
    if family == "vera":
        leaves |= {"a": jnp.asarray(arrays["f.vera_A"]), "b": jnp.asarray(arrays["f.vera_B"].T)}
    if "scale" in arrays:
        np.testing.assert_allclose(node.scale, arrays["scale"], rtol=1e-6)
    delta["weight"] = dataclasses.replace(node, **leaves)
    if "bias" in delta:
        delta["bias"] = dataclasses.replace(delta["bias"], gain=leaves["gain"])
    cotangent = jnp.asarray(arrays["cotangent"])
    train, frozen = lora.partition(delta)

    def loss(train, x):
        whole = lora.join(train, frozen)
        y = fn(lora.merge(base, whole), x) if merged else lora.adapt(fn)(base, whole, x)
        return jnp.sum(y * cotangent), y

    argnums = 0 if kind == "embedding" else (0, 1)
    (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(train, x)
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(y, arrays["y"], **close)
    by_leaf = gradients if kind == "embedding" else gradients[0]
    for name, (theirs, ours) in names.items():
        gradient = getattr(by_leaf["weight"], name)
        if "bias" in by_leaf:
            gradient = gradient + by_leaf["bias"].gain
        np.testing.assert_allclose(gradient, ours(arrays[f"g.{theirs}"]), **close, err_msg=name)
    if kind != "embedding":
        np.testing.assert_allclose(gradients[1], arrays["grad_x"], **close)


WEIGHT = jax.random.normal(jax.random.key(7), (24, 36))


def create(recipe, shape=None, axes=("in", "out")):
    return recipe.create(jax.random.key(0), WEIGHT if shape is None else jnp.ones(shape), axes)


def test_vera_shares_one_pair_among_weights_of_a_size_and_lets_go_of_it():
    one, two = create(lora.VeRA(256)), create(lora.VeRA(256))
    assert one.a is two.a and one.b is two.b
    assert create(lora.VeRA(256), (24, 20)).a is one.a
    assert create(lora.VeRA(256, seed=1)).a is not one.a
    assert create(lora.VeRA(256, dtype=jnp.bfloat16)).a.dtype == jnp.bfloat16
    stacked = create(lora.VeRA(256), (3, 24, 36), ("batch", "in", "out"))
    assert stacked.a is one.a and stacked.d.shape == (3, 256) and stacked.g.shape == (3, 36)
    square = create(lora.VeRA(8), (24, 24))
    assert (np.asarray(square.a) != np.asarray(square.b)).any()
    from lora_jax.adapters import vera

    before = len(vera._SHARED)
    del one, two, stacked
    gc.collect()
    assert len(vera._SHARED) < before


def test_vera_starts_as_pefts():
    node = create(lora.VeRA(256))
    for pair, fan in ((node.a, 24), (node.b, 256)):
        bound = np.sqrt(6 / fan)
        assert stats.kstest(np.ravel(pair), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-3
    assert (np.asarray(node.d) == np.float32(0.1)).all() and not np.asarray(node.g).any()


def test_loha_and_lokr_start_as_pefts():
    node = create(lora.LoHa(16))
    for leaf, deviation in ((node.a1, 1.0), (node.b1, 0.1), (node.a2, 1.0)):
        assert stats.kstest(np.ravel(leaf), stats.norm(0, deviation).cdf).pvalue > 1e-3
    assert not np.asarray(node.b2).any()
    node = create(lora.LoKr(2), (2400, 3600))
    assert node.c.shape == (48, 60) and not np.asarray(node.c).any()
    for leaf, fan in ((node.a, 50), (node.b, 2)):
        assert stats.kstest(np.ravel(leaf), stats.uniform(-(fan**-0.5), 2 * fan**-0.5).cdf).pvalue > 1e-3
    assert create(lora.LoKr(64, alpha=16), (64, 64)).scale == 0.25


def test_a_divisor_may_be_bounded():
    assert create(lora.LoKr(2, factor=3), (24, 36)).c.shape == (3, 3)
    assert create(lora.LoKr(2), (7, 36)).c.shape == (1, 6)


def test_loha_of_a_rank_whose_square_is_above_the_weights_is_merged_and_says_so():
    base, fn, x = {"w": WEIGHT}, lambda base, x: x @ base["w"], jnp.ones((2, 24))
    for rank, factored in ((4, True), (5, False)):
        delta = lora.init(jax.random.key(0), base, {"w": lora.LoHa(rank)}, fn, x)
        explained = lora.explain(fn, base, delta, x)
        assert explained.factored == factored
        assert ("rank²" in str(explained)) != factored


def test_lora_fa_trains_b_alone_and_keeps_no_input_for_a():
    base, fn = {"w": WEIGHT}, lambda base, x: x @ base["w"]
    x = jnp.ones((64, 24))
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRAFA(2, alpha=4)}, fn, x)
    train, frozen = lora.partition(delta)
    assert [leaf.shape for leaf in jax.tree.leaves(train)] == [(2, 36)]

    def out(train):
        return lora.adapt(fn)(base, lora.join(train, frozen), x)

    _, pullback = jax.vjp(out, train)
    residuals = [leaf.shape for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "shape")]
    assert x.shape not in residuals and (64, 2) in residuals


def test_lora_fa_refuses_a_zero_a():
    table = {"w": jnp.ones((8, 4))}
    with pytest.raises(ValueError, match=r"zero a, which stays zero: choose an init that draws a"):
        lora.init(jax.random.key(0), table, {"w": lora.LoRAFA(2, axes=("lookup", "out"))})
    with pytest.raises(ValueError, match=r"zero a, which stays zero"):
        jax.jit(lambda key: lora.init(key, table, {"w": lora.LoRAFA(2, axes=("lookup", "out"))}))(jax.random.key(0))
    lora.init(jax.random.key(0), table, {"w": lora.LoRAFA(2, axes=("lookup", "out"), init="gaussian")})


@pytest.mark.parametrize(
    "recipe, shape, axes, message",
    [
        (lora.VeRA(2), (4,), ("out",), r"VeRA needs an in and an out axis; .* no 'in' axis"),
        (lora.LoHa(5), (4, 8), ("in", "out"), r"LoHa\(rank=5\) is above the rank of the weight: .* at most of rank 4"),
        (lora.LoKr(2), (4, 8), ("in", "in"), r"LoKr needs an in and an out axis; .* no 'out' axis"),
        (lora.IA3("in"), (4,), ("out",), r"IA3\(on='in'\): .* no 'in' axis"),
        (lora.IA3(), (4, 8), ("in",), r"gives 1 roles"),
    ],
    ids=str,
)
def test_weights_that_a_recipe_does_not_fit(recipe, shape, axes, message):
    with pytest.raises(ValueError, match=message):
        create(recipe, shape, axes)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lora.VeRA(0), r"VeRA\(rank=0\): expected a positive integer"),
        (lambda: lora.DVoRA(2, norm_over="rows"), r"DVoRA\(norm_over='rows'\): expected one of 'in', 'out'"),
        (lambda: lora.DoRA(2, norm_over="rows"), r"DoRA\(norm_over='rows'\): expected one of 'in', 'out'"),
        (lambda: lora.LoRA(2, dropout=1 - 1e-12), r"LoRA\(dropout=0\.9+\): expected a rate of at least 0 and below 1"),
        (lambda: lora.VeRA(2, dropout=1.0), r"VeRA\(dropout=1.0\): expected a rate of at least 0 and below 1"),
        (lambda: lora.IA3("both"), r"IA3\(on='both'\): expected one of 'out', 'in'"),
        (lambda: lora.LoHa(2, dtype=jnp.int8), r"LoHa\(dtype=int8\): expected a floating-point dtype"),
        (lambda: lora.LoKr(2, factor=0), r"LoKr\(factor=0\): expected a positive integer"),
    ],
)
def test_arguments_that_no_recipe_takes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("recipe", [lora.DVoRA(2), lora.DoRA(2)], ids=["DVoRA", "DoRA"])
def test_magnitudes_need_the_weights_values(recipe):
    with pytest.raises(ValueError, match="starts from the weight's norms; the base has its shape only"):
        recipe.create(jax.random.key(0), jax.ShapeDtypeStruct((4, 8), jnp.float32), ("in", "out"))


def test_a_shared_pair_is_saved_and_counted_once(tmp_path):
    base = {str(i): jnp.ones((24, 36)) for i in range(3)}
    delta = lora.init(jax.random.key(0), base, {".": lora.VeRA(64, axes=("in", "out"))})
    pair, vectors = 64 * (24 + 36) * 4, 3 * (64 + 36 + 2) * 4  # a scale and a rate each
    assert lora.summary(base, delta).delta_bytes == pair + vectors
    lora.save(tmp_path / "adapter", jax.tree.map(jnp.copy, delta))  # copies, as after a transformation
    stored = sum(file.stat().st_size for file in (tmp_path / "adapter" / "arrays").rglob("*") if file.is_file())
    loaded = lora.load(tmp_path / "adapter", base)
    assert loaded["0"].a is loaded["1"].a is loaded["2"].a
    np.testing.assert_array_equal(loaded["2"].b, delta["0"].b)
    assert stored < 2 * pair


@pytest.mark.parametrize("recipe", [lora.DoRA, lora.DVoRA])
def test_narrow_factors_start_from_the_function(recipe):
    base, fn, x = {"w": WEIGHT}, lambda base, x: x @ base["w"], jnp.ones((2, 24))
    delta = lora.init(jax.random.key(0), base, {"w": recipe(2, dtype=jnp.bfloat16)}, fn, x)
    assert jax.tree.leaves(lora.partition(delta)[0])[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(lora.adapt(fn)(base, delta, x), fn(base, x))


def test_training_keeps_a_shared_pair_shared(lenient):
    base, x = {"0": jnp.ones((6, 6)), "1": jnp.ones((6, 6))}, jnp.ones((2, 6))
    fn = lambda base, x: x @ base["0"] @ base["1"]  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {".": lora.VeRA(4)}, fn, x)
    adapted, tx = lora.adapt(fn), optax.sgd(0.1)
    state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
    step = lora.train_step(lambda base, delta, x, key: jnp.mean(adapted(base, delta, x)), tx)
    for _ in range(2):
        state, _ = step(state, x)
    assert state.delta["0"].a is state.delta["1"].a is delta["0"].a
    assert np.asarray(state.delta["1"].g).any() and np.asarray(delta["0"].a).any()
