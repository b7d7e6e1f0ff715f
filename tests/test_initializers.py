"""Initializers: PEFT's results where PEFT has the method, what they promise of the first output, what they read."""

import dataclasses
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy import stats

import lora_jax as lora
from lora_jax.calibration import collect_stats
from lora_jax.initializers import EVA, INPUTS, CorDA, Initializer, LoftQ, LoRAGA, PiSSA, decomposition

FIXTURE = np.load(pathlib.Path(__file__).parent / "fixtures" / "adapters" / "initializers.npz")
WEIGHTS = ("up", "down")
RANK, ALPHA = 3, 6
X = jnp.asarray(FIXTURE["x"])


def fn(base, x):
    return jnp.tanh(x @ base["up"]) @ base["down"]


def loss(base, x):
    return jnp.mean(jnp.square(fn(base, x)))


def published():
    return {name: jnp.asarray(FIXTURE[f"base.{name}"].T) for name in WEIGHTS}


def added(node):
    """ΔW."""
    return np.asarray(node.merge(jnp.zeros(node.shape())))


def pefts(name, module):
    """PEFT's a, b and base in this library's orientation."""
    a, b, base = (FIXTURE[f"{name}.{module}.{part}"] for part in ("a", "b", "base"))
    return a, b.T, base.T


# As PEFT has them.


@pytest.mark.parametrize(
    "name, init, tolerance",
    [
        ("pissa", "pissa", 1e-5),
        ("pissa_niter_16", PiSSA(niter=16), 1e-5),
        ("olora", "olora", 1e-5),
        ("corda_ipm", "corda", 1e-3),
        ("corda_kpm", CorDA(keep_knowledge=True), 1e-3),
    ],
)
def test_moved_parts_are_pefts(name, init, tolerance):
    recipe = lora.LoRA(RANK, ALPHA, init=init)
    base, delta = lora.prepare(jax.random.key(0), published(), {".": recipe}, fn, [X])
    for module in WEIGHTS:
        a, b, moved = pefts(name, module)
        assert float(FIXTURE[f"{name}.{module}.scale"]) == float(delta[module].scale) == 2.0
        np.testing.assert_allclose(added(delta[module]), 2.0 * a.T @ b, atol=tolerance)
        np.testing.assert_allclose(base[module], moved, atol=tolerance)


@pytest.mark.parametrize("keep_knowledge", [False, True])
def test_corda_is_exact_in_float32(keep_knowledge):
    """PEFT's own results, which invert a matrix, are up to 1e-4 from these."""
    recipe = lora.LoRA(RANK, ALPHA, init=CorDA(keep_knowledge))
    _, delta = lora.prepare(jax.random.key(0), published(), {"up": recipe}, fn, [X])
    x, weight = (np.asarray(array, np.float64) for array in (X, published()["up"]))
    squares = x.T @ x
    damped = squares + 0.01 * np.trace(squares) / len(squares) * np.eye(len(squares))
    u, s, vt = np.linalg.svd(damped @ weight, full_matrices=False)
    chosen = slice(-RANK, None) if keep_knowledge else slice(RANK)
    expected = np.linalg.inv(damped) @ u[:, chosen] @ np.diag(s[chosen]) @ vt[chosen]
    np.testing.assert_allclose(added(delta["up"]), expected, atol=5e-5)


def test_eva_has_pefts_ranks_and_directions():
    _, delta = lora.prepare(jax.random.key(0), published(), {".": lora.LoRA(RANK, ALPHA, init="eva")}, fn, [X])
    ranks = {module: FIXTURE[f"eva.{module}.a"].shape[0] for module in WEIGHTS}
    assert {module: node.rank for module, node in delta.items()} == ranks == {"up": 4, "down": 2}
    for module, node in delta.items():
        assert float(node.scale) == float(FIXTURE[f"eva.{module}.scale"]) == 2.0
        assert not node.b.any()
        np.testing.assert_allclose(np.linalg.norm(node.a, axis=1), 1.0, rtol=1e-4)
        assert_same_directions(node.a, FIXTURE[f"eva.{module}.a"])


def test_lora_ga_has_pefts_directions_and_the_papers_size():
    spec = {".": lora.LoRA(RANK, ALPHA, init="lora_ga")}
    base, delta = lora.prepare(jax.random.key(0), published(), spec, fn, [X], loss=loss)
    for module, node in delta.items():
        a, b, _ = pefts("lora_ga", module)
        size = np.sqrt(np.sqrt(node.b.shape[1]) / 16)
        for ours, stored in ((node.a, a), (node.b, b)):
            assert_same_directions(ours, stored)
            np.testing.assert_allclose(np.linalg.norm(ours, axis=1), size, rtol=1e-4)
        np.testing.assert_allclose(base[module] + added(node), published()[module], atol=1e-5)


def assert_same_directions(ours, stored):
    """Rows are singular vectors, of either sign."""
    rows = [np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, stored)]
    np.testing.assert_allclose(np.abs(np.sum(rows[0] * rows[1], axis=1)), 1.0, atol=1e-3)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_loftq_is_pefts_where_alpha_is_the_rank(iterations):
    recipe = lora.LoRA(RANK, RANK, init=LoftQ(rounded, iterations=iterations))
    base, delta = lora.prepare(jax.random.key(0), published(), {"up": recipe}, fn, [X])
    # A weight may lie so near to the middle of two levels that products rounded otherwise choose the other.
    same = np.asarray(base["up"]) == FIXTURE[f"loftq.{iterations}.base"].T
    assert same.mean() > 0.99
    np.testing.assert_allclose(added(delta["up"]), FIXTURE[f"loftq.{iterations}.delta"].T, atol=2e-2)


def rounded(weight):
    return jnp.round(weight * 4) / 4


# Initial distributions.


def drawn(init, rank=8, shape=(400, 100), axes=("in", "out")):
    return lora.LoRA(rank, init=init).create(jax.random.key(3), jnp.zeros(shape), axes)


def test_kaiming_uniform_is_uniform_with_b_zero():
    node = drawn("kaiming_uniform")
    assert stats.kstest(np.ravel(node.a) * 20, stats.uniform(-1, 2).cdf).pvalue > 0.01
    assert not node.b.any()


def test_gaussian_has_one_over_the_rank_as_deviation_with_b_zero():
    node = drawn("gaussian")
    assert stats.kstest(np.ravel(node.a) * 8, "norm").pvalue > 0.01
    assert not node.b.any()


@pytest.mark.parametrize("init, axes", [("kaiming_uniform", ("lookup", "out")), ("zero_a", ("in", "out"))])
def test_embeddings_and_zero_a_have_a_zero_and_b_normal(init, axes):
    node = drawn(init, axes=axes)
    assert not node.a.any()
    assert stats.kstest(np.ravel(node.b), "norm").pvalue > 0.01


def test_orthogonal_is_distributed_as_pefts_and_its_product_is_zero():
    node = drawn("orthogonal", rank=16, shape=(24, 32))
    stored_a, stored_b, _ = pefts("orthogonal", "up")
    for ours, stored in ((node.a, stored_a), (node.b, stored_b)):
        ours, stored = np.asarray(ours), np.asarray(stored)
        assert np.linalg.matrix_rank(ours, tol=1e-4) == np.linalg.matrix_rank(stored, tol=1e-4) == 8
        assert stats.ks_2samp(ours.ravel(), stored.ravel()).pvalue > 0.01
    for a, b in ((node.a, node.b), (stored_a, stored_b)):
        assert np.abs(np.asarray(a).T @ np.asarray(b)).max() < 1e-7 < np.abs(np.asarray(a)).max()
    with pytest.raises(ValueError, match=r"even rank.*3"):
        drawn("orthogonal", rank=3)


# The first output.

INITS = (
    "orthogonal",
    "eva",
    "pissa",
    PiSSA(niter=4),
    "milora",
    "olora",
    "corda",
    CorDA(keep_knowledge=True),
    "lora_ga",
)


def stacked(base, x):
    """Two layers in a scan, a kernel with two in axes, a convolution."""

    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = lax.scan(jax.checkpoint(layer), x, base["layers"])
    h = lax.conv_general_dilated(h, base["conv"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jnp.einsum("bthk,hko->bto", h.reshape(*h.shape[:2], 2, 4), base["heads"])


def stacked_base(dtype=jnp.float32):
    shapes = {"layers": (2, 6, 6), "conv": (3, 6, 8), "heads": (2, 4, 10)}
    keys = jax.random.split(jax.random.key(5), len(shapes))
    return {path: (jax.random.normal(k, s) / 2).astype(dtype) for k, (path, s) in zip(keys, shapes.items())}


TOKENS = jax.random.normal(jax.random.key(6), (2, 5, 6))
STACKED, ADAPTED, MERGED = jax.jit(stacked), jax.jit(lora.adapt(stacked)), jax.jit(lora.merge)


@pytest.mark.parametrize(
    "recipe, init",
    [*((lora.LoRA, init) for init in INITS), (lora.DoRA, "olora"), (lora.DoRA, "corda")],
)
def test_the_first_output_is_unchanged(recipe, init):
    base = stacked_base()
    options = {"loss": lambda base, x: jnp.sum(jnp.sin(stacked(base, x)))} if init == "lora_ga" else {}
    spec = {".": recipe(2, 3, init=init)}
    prepare = lambda base: lora.prepare(jax.random.key(0), base, spec, stacked, [TOKENS], **options)  # noqa: E731
    # EVA's ranks are numbers, which a compiled prepare does not have.
    moved, delta = prepare(base) if init == "eva" else jax.jit(prepare)(base)
    np.testing.assert_allclose(ADAPTED(moved, delta, TOKENS), STACKED(base, TOKENS), rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), MERGED(moved, delta), base)
    changed = [path for path in base if (np.asarray(moved[path]) != np.asarray(base[path])).any()]
    assert changed == ([] if init in ("eva", "orthogonal") else list(base))


def test_milora_takes_the_smallest_singular_values():
    weight = np.asarray(published()["up"])
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    base, delta = lora.prepare(jax.random.key(0), published(), {"up": lora.LoRA(2, 3, init="milora")}, fn, [X])
    np.testing.assert_allclose(added(delta["up"]), u[:, -2:] * s[-2:] @ vt[-2:], atol=1e-5)
    np.testing.assert_allclose(base["up"], u[:, :-2] * s[:-2] @ vt[:-2], atol=1e-5)
    scaled = np.linalg.norm(delta["up"].a, axis=1), np.linalg.norm(delta["up"].b, axis=1)
    np.testing.assert_allclose(*scaled, rtol=1e-4)  # √Σ on both


def test_pissa_takes_the_largest_singular_values():
    base = stacked_base()
    moved, _ = lora.prepare(jax.random.key(0), base, {"layers": lora.LoRA(2, 3, init="pissa")}, stacked, [TOKENS])
    whole, rest = (np.linalg.svd(x["layers"], compute_uv=False) for x in (base, moved))
    np.testing.assert_allclose(rest[:, :4], whole[:, 2:], rtol=1e-4)
    assert (rest[:, 4:] < 1e-5).all()


def test_in_bfloat16_the_first_output_moves_by_the_rounding_of_the_base():
    base = stacked_base(jnp.bfloat16)
    moved, delta = lora.prepare(jax.random.key(0), base, {"layers": lora.LoRA(2, init="pissa")}, stacked_cast, [TOKENS])
    assert moved["layers"].dtype == jnp.bfloat16
    whole = delta["layers"].merge(moved["layers"].astype(jnp.float32)) - base["layers"].astype(jnp.float32)
    # Half a unit in the last of eight bits of what is left of the weight.
    assert (np.abs(whole) <= np.abs(moved["layers"].astype(jnp.float32)) * 2.0**-8 + 1e-6).all()


def stacked_cast(base, x):
    return stacked(jax.tree.map(lambda leaf: leaf.astype(x.dtype), base), x)


@pytest.mark.parametrize("init", ["pissa", "eva", "lora_ga"])
def test_blocks_start_by_themselves(init):
    base = {"qkv": jax.random.normal(jax.random.key(1), (8, 12))}
    product, x = (lambda base, x: x @ base["qkv"]), jax.random.normal(jax.random.key(2), (5, 8))
    recipe = lora.LoRA(2, 3, init=init, blocks=(True, False, True))
    options = {"loss": lambda base, x: jnp.sum(jnp.sin(product(base, x)))} if init == "lora_ga" else {}
    moved, delta = lora.prepare(jax.random.key(0), base, {"qkv": recipe}, product, [x], **options)
    np.testing.assert_allclose(lora.merge(moved, delta)["qkv"], base["qkv"], atol=1e-5)
    np.testing.assert_array_equal(moved["qkv"][:, 4:8], base["qkv"][:, 4:8])
    if init == "pissa":
        alone, _ = lora.prepare(
            jax.random.key(0), {"qkv": base["qkv"][:, 8:]}, {"qkv": lora.LoRA(2, 3, init=init)}, product, [x]
        )
        np.testing.assert_allclose(moved["qkv"][:, 8:], alone["qkv"], atol=1e-5)


def test_loftq_starts_nearer_to_the_weight_than_quantizing_alone():
    base, (alone, once, more) = published(), (rounded(published()["up"]), 1, 4)
    errors = [float(jnp.linalg.norm(alone - base["up"]))]
    for iterations in (once, more):
        # A scale that is not one: the product is divided by it.
        recipe = lora.LoRA(8, 4, init=LoftQ(rounded, iterations=iterations))
        moved, delta = lora.prepare(jax.random.key(0), base, {"up": recipe}, fn, [X])
        np.testing.assert_array_equal(rounded(moved["up"]), moved["up"])
        errors.append(float(jnp.linalg.norm(lora.merge(moved, delta)["up"] - base["up"])))
    assert errors[2] < errors[1] < 0.8 * errors[0]


def test_loftq_keeps_the_quantized_leaf():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Codes:
        codes: jax.Array

        def dequantize(self):
            return self.codes.astype(jnp.float32) / 4

    def quantizer(weight):
        return Codes(jnp.round(weight * 4).astype(jnp.int8))

    plain, nodes = (
        lora.prepare(jax.random.key(0), published(), {"up": lora.LoRA(RANK, init=LoftQ(q, 2))}, fn, [X])
        for q in (rounded, quantizer)
    )
    np.testing.assert_array_equal(nodes[0]["up"].dequantize(), plain[0]["up"])
    np.testing.assert_allclose(added(nodes[1]["up"]), added(plain[1]["up"]), atol=1e-6)


# EVA's ranks.


def test_eva_pads_the_layers_of_a_stack_and_leaves_out_what_gets_no_rank():
    key = jax.random.key(4)
    x = jax.random.normal(key, (64, 6)) * jnp.asarray([4.0, 3.0, 2.0, 1.0, 0.5, 0.1])[None]
    # The first layer's inputs vary in many directions, the second's in one, the last weight's not at all.
    base = {
        "layers": jnp.stack([jnp.outer(jnp.ones(6), jnp.arange(1.0, 7.0)) / 50, jnp.eye(6)]),
        "last": jnp.ones((6, 6)),
    }

    def function(base, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, base["layers"])
        return h + jnp.zeros_like(h) @ base["last"]

    _, delta = lora.prepare(key, base, {".": lora.LoRA(2, init=EVA(rho=2.0))}, function, [x])
    assert list(delta) == ["layers"]
    used = np.asarray(delta["layers"].a).any(axis=2)
    assert used.shape[1] <= 4 and used.sum() <= 6
    assert used[0].sum() > used[1].sum() >= 1
    assert (np.diff(used.astype(int), axis=1) <= 0).all()  # zeros come last
    norms = np.linalg.norm(delta["layers"].a, axis=2)
    np.testing.assert_allclose(norms, used, atol=1e-5)
    # rho=1 gives none more than the recipe's rank.
    _, even = lora.prepare(key, base, {"layers": lora.LoRA(2, init=EVA(rho=1.0))}, function, [x])
    assert even["layers"].rank == 2


# What is read.


def read(function, base, axes, *batches):
    inputs_by_path = collect_stats(
        function, None, base, {path: (INPUTS, roles) for path, roles in axes.items()}, batches
    )
    return {path: reading.inputs for path, reading in inputs_by_path.items()}


def by_hand(*inputs):
    rows = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in inputs])
    return rows.T @ rows, rows.sum(axis=0), len(rows)


def assert_read(inputs, index, *rows):
    for actual, expected in zip((inputs.squares, inputs.total, inputs.count), by_hand(*rows)):
        np.testing.assert_allclose(actual[index], expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_added_up_over_uses_calls_and_batches():
    w = jax.random.normal(jax.random.key(1), (4, 4)) / 2
    xs = [jax.random.normal(jax.random.key(i), (3, 5, 4)) for i in (2, 3)]

    @jax.jit
    def twice(w, x):
        return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x) @ w.T.reshape(2, 2, 4).reshape(4, 4).T

    def function(base, x, flag):
        h = twice(base["w"], x)
        return {"ids": jnp.argmax(h), "h": lax.cond(flag, lambda h: 2 * (h @ base["w"]), lambda h: h, h), "text": "a"}

    (inputs,) = read(
        function, {"w": w}, {"w": ("in", "out")}, *((x, jnp.asarray(i == 0)) for i, x in enumerate(xs))
    ).values()
    hidden = [jnp.tanh(x @ w) for x in xs]
    assert_read(inputs, 0, *xs, *hidden, hidden[0] @ w)


def test_inputs_of_stacked_layers_kernels_of_heads_and_convolutions():
    base = stacked_base()
    axes = {"layers": ("batch", "in", "out"), "conv": ("in", "in", "out"), "heads": ("in", "in", "out")}
    readings = read(stacked, base, axes, (TOKENS,))
    h = TOKENS
    for layer in range(2):
        assert_read(readings["layers"], layer, h)
        h = jnp.tanh(h @ base["layers"][layer])
    # "SAME" with stride 2 on five places pads one on each side: windows start at -1, 1 and 3.
    padded = np.pad(h, [(0, 0), (1, 1), (0, 0)])
    windows = np.stack([padded[:, start : start + 3].reshape(2, 18) for start in (0, 2, 4)], axis=1)
    assert_read(readings["conv"], 0, windows)
    assert_read(readings["heads"], 0, np.einsum("btf,fo->bto", windows, np.asarray(base["conv"]).reshape(18, 8)))


def test_inputs_of_experts():
    base = {"w": jax.random.normal(jax.random.key(1), (3, 4, 5))}
    rows, sizes = jax.random.normal(jax.random.key(2), (7, 4)), jnp.asarray([4, 0, 3])
    axes = {"w": ("batch", "in", "out")}
    (ragged,) = read(lambda base, x: lax.ragged_dot(x, base["w"], sizes), base, axes, (rows,)).values()
    for expert, part in enumerate((rows[:4], rows[:0], rows[4:])):
        assert_read(ragged, expert, part)
    # Each token's own expert's weight is gathered.
    ids = jnp.asarray([0, 0, 0, 0, 2, 2, 2])
    (gathered,) = read(lambda base, x: jnp.einsum("ti,tio->to", x, base["w"][ids]), base, axes, (rows,)).values()
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), gathered, ragged)
    # Declared batch axes that trace as out: every expert sees every token.
    (dense,) = read(lambda base, x: jnp.einsum("ti,eio->teo", x, base["w"]), base, axes, (rows,)).values()
    for expert in range(3):
        assert_read(dense, expert, rows)
    # An expert without tokens starts from its own singular values.
    spec = {"w": lora.LoRA(2, init="corda")}
    moved, delta = lora.prepare(
        jax.random.key(0), base, spec, lambda base, x: lax.ragged_dot(x, base["w"], sizes), [rows]
    )
    np.testing.assert_allclose(lora.merge(moved, delta)["w"], base["w"], atol=1e-4)


SQUARE = {"w": jnp.ones((4, 4))}


def from_while(base, x):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ base["w"]), (0, x))[1]


@jax.custom_vjp
def own_rule(w, x):
    return x @ w


own_rule.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda base, x: x @ jnp.tanh(base["w"]), r"'w': its inputs cannot be read here.*tanh"),
        (lambda base, x: (x @ base["w"]) @ base["w"].T, r"'w'.*other axes than its in axes"),
        (lambda base, x: x[:, :2] @ base["w"][:2] + x @ base["w"], r"'w'.*a part of its in axes"),
        (lambda base, x: own_rule(base["w"], x), r"'w'.*cannot be read here"),
        (lambda base, x: jnp.argmax(x @ base["w"]), "returns no floats"),
        (lambda base, x: lax.stop_gradient(x @ base["w"]), r"'w': no input was seen"),
    ],
)
def test_inputs_that_cannot_be_read(function, message):
    with pytest.raises(ValueError, match=message):
        lora.prepare(
            jax.random.key(0), SQUARE, {"w": lora.LoRA(1, init="eva", axes=("in", "out"))}, function, [X[:3, :4]]
        )


def test_inputs_inside_loops_that_have_no_gradient_are_refused():
    with pytest.raises(ValueError, match=r"'w': its inputs cannot be read here: a while loop has no gradient"):
        lora.prepare(jax.random.key(0), SQUARE, {"w": lora.LoRA(1, init="eva")}, from_while, [X[:3, :4]])


def test_inputs_of_lookups_are_refused():
    table, look_up = {"t": jnp.ones((5, 3))}, lambda base, ids: base["t"][ids]
    with pytest.raises(ValueError, match=r"'t': its inputs cannot be collected, because it is indexed"):
        lora.prepare(jax.random.key(0), table, {"t": lora.LoRA(1, init="eva")}, look_up, [jnp.asarray([0])])


# prepare() and its data.


def test_batches_are_consumed_once_and_all_are_read():
    pulled = []

    def batches():
        for start in (0, 50, 100, 150):
            pulled.append(start)
            yield (X[start : start + 50],)

    spec = {"up": lora.LoRA(RANK, init="eva"), "down": lora.LoRA(RANK, init="lora_ga")}
    _, split = lora.prepare(jax.random.key(0), published(), spec, fn, batches(), loss=loss)
    _, whole = lora.prepare(jax.random.key(0), published(), spec, fn, [X], loss=loss)
    assert pulled == [0, 50, 100, 150]
    assert_same_directions(split["up"].a, whole["up"].a)
    assert_same_directions(split["down"].a, whole["down"].a)
    assert_same_directions(split["down"].b, whole["down"].b)


@pytest.mark.parametrize("parent, options", [(CorDA, {}), (LoRAGA, {"loss": lambda p, x: jnp.sum(chained(p, x) ** 2)})])
def test_what_was_read_is_held_once_and_weight_by_weight(parent, options):
    held = []

    class Watching(parent):
        def make_factors(self, target):
            held.append(live() - before)
            return super().make_factors(target)

    def live():
        return sum(array.nbytes for array in jax.live_arrays()) / base["0"].nbytes

    base = {str(i): jax.random.normal(jax.random.key(i), (64, 64)) / 8 for i in range(4)}
    spec, x = {".": lora.LoRA(2, init=Watching())}, jax.random.normal(jax.random.key(5), (4, 64))
    gc.collect()
    before = live()
    lora.prepare(jax.random.key(0), base, spec, chained, [x, x], **options)
    # Four weights, read or moved already, and what the factors of one are made of.
    assert len(held) == 4 and max(held) < 5.5


def chained(base, x):
    for weight in base.values():
        x = jnp.tanh(x @ weight)
    return x


def test_data_is_not_read_unasked():
    def batches():
        yield X
        raise AssertionError("a second batch was drawn")

    lora.prepare(jax.random.key(0), published(), {"up": lora.LoRA(2, init="pissa")}, fn, batches())


@pytest.mark.parametrize(
    "init, does", [("eva", "reads the inputs"), ("lora_ga", "reads the gradient"), ("pissa", "moves")]
)
def test_init_names_prepare(init, does):
    with pytest.raises(ValueError, match=rf"'up': LoRA\(init='{init}'\) {does}.*lora_jax.prepare"):
        lora.init(jax.random.key(0), published(), {"up": lora.LoRA(2, init=init)}, fn, X)


def test_prepare_refuses():
    def prepare(init, batches=(X,), **options):
        spec = {"up": lora.LoRA(RANK, options.pop("alpha", None), init=init)}
        return lora.prepare(jax.random.key(0), published(), spec, fn, batches, **options)

    with pytest.raises(ValueError, match=r"'up'.*reads the gradient of a loss"):
        prepare("lora_ga")
    with pytest.raises(ValueError, match="no recipe of the spec has an initializer that reads gradients"):
        prepare("eva", loss=loss)
    with pytest.raises(ValueError, match="at least one batch"):
        prepare("eva", ())
    for batches in (X, np.asarray(X), {"x": X}):
        with pytest.raises(TypeError, match=r"iterable of batches.*write \[batch\]"):
            prepare("pissa", batches)
    with pytest.raises(ValueError, match=r"scalar float from loss\(base, \*batch\), got \(200, 28\)"):
        prepare("lora_ga", loss=fn)
    with pytest.raises(ValueError, match="positive scale"):
        prepare("pissa", alpha=-1.0)
    with pytest.raises(ValueError, match="quantizer returned"):
        prepare(LoftQ(jnp.ravel))
    with pytest.raises(ValueError, match=r"init=LoftQ\(quantizer\)"):
        prepare("loftq")
    with pytest.raises(ValueError, match=r"singular vectors.*26"):
        lora.prepare(jax.random.key(0), published(), {"up": lora.LoRA(13, init=LoRAGA())}, fn, [X], loss=loss)
    for bad in (lambda: EVA(rho=0.5), lambda: LoftQ(rounded, 0), lambda: LoRAGA(gamma=0.0)):
        with pytest.raises(ValueError, match=r"at least|above|expected a positive integer"):
            bad()
    with pytest.raises(TypeError, match="define make_factors"):
        drawn(Initializer())


def test_prepare_refuses_what_is_not_finite():
    bad = X.at[0, 0].set(jnp.nan)
    messages = {"corda": "inputs contain NaN", "eva": "inputs contain NaN", "lora_ga": "gradient contains NaN"}
    for init, message in messages.items():
        options = {"loss": loss} if init == "lora_ga" else {}
        with pytest.raises(ValueError, match=f"'up': the {message}"):
            lora.prepare(jax.random.key(0), published(), {"up": lora.LoRA(2, init=init)}, fn, [X, bad], **options)

    class Broken(PiSSA):
        def make_factors(self, target):
            return dataclasses.replace(super().make_factors(target), leaf=target.leaf / 0)

    spec = {"up": lora.LoRA(2, init=Broken())}
    with pytest.raises(ValueError, match=r"'up': LoRA\(.*makes a finite weight one with NaN or Inf"):
        lora.prepare(jax.random.key(0), published(), spec, fn, [X])


@pytest.mark.parametrize("init", ["pissa", "corda", LoftQ(lambda weight: weight.at[0, 0].set(jnp.inf))])
def test_infinite_weights_are_refused_before_a_decomposition_that_would_not_end(init):
    base = published() if isinstance(init, LoftQ) else {**published(), "up": published()["up"].at[0, 0].set(jnp.inf)}
    with pytest.raises(ValueError, match="'up': the matrix to decompose has NaN or Inf"):
        lora.prepare(jax.random.key(0), base, {"up": lora.LoRA(2, init=init)}, fn, [X])


def test_eva_refuses_inputs_that_do_not_vary_and_tracing():
    spec = {"up": lora.LoRA(2, init="eva")}
    with pytest.raises(ValueError, match="'up': EVA leaves out all"):
        lora.prepare(jax.random.key(0), published(), spec, fn, [jnp.ones_like(X)])
    with pytest.raises(ValueError, match="'up': EVA decides ranks from values: call prepare outside of jit"):
        jax.jit(lambda base: lora.prepare(jax.random.key(0), base, spec, fn, [X]))(published())


def test_moved_weights_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "model"))
    base = {name: jax.device_put(weight, sharding) for name, weight in published().items()}
    for init in ("pissa", "corda"):
        moved, delta = lora.prepare(jax.random.key(0), base, {"up": lora.LoRA(RANK, init=init)}, fn, [X])
        assert moved["up"].sharding == sharding and moved["down"] is base["down"]
        np.testing.assert_allclose(lora.merge(moved, delta)["up"], base["up"], atol=1e-5)


# Plain LoRA.


@pytest.mark.parametrize("init, recipe", [("pissa", lora.LoRA), ("olora", lora.DoRA)])
def test_a_trained_moved_part_is_a_plain_lora_of_twice_the_rank(init, recipe):
    base = stacked_base()
    spec = {"layers|heads": recipe(2, 3, init=init), "conv": lora.Full()}
    moved, start = lora.prepare(jax.random.key(0), base, spec, stacked, [TOKENS])
    train, frozen = lora.partition(start)
    draw = np.random.default_rng(8)
    delta = lora.join(jax.tree.map(lambda leaf: leaf + draw.normal(0, 0.1, leaf.shape).astype("f"), train), frozen)
    plain = lora.to_plain_lora(delta, start)
    assert [plain[path].rank for path in ("layers", "heads")] == [4, 4]
    expected = ADAPTED(moved, delta, TOKENS)
    np.testing.assert_allclose(ADAPTED(base, plain, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_plain_lora_refuses_and_leaves_alone():
    base = published()
    kaiming = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2)}, fn, X)
    trained = jax.tree.map(lambda leaf: leaf + 1, kaiming)
    jax.tree.map(np.testing.assert_array_equal, lora.to_plain_lora(trained, kaiming), trained)
    other = lora.init(jax.random.key(0), base, {"down": lora.LoRA(2, init="orthogonal")}, fn, X)
    with pytest.raises(ValueError, match="paths, 'down'"):
        lora.to_plain_lora(trained, other)
    with pytest.raises(ValueError, match=r"'up': the adapter and its start differ.*\(24, 32\).*\(32, 28\)"):
        lora.to_plain_lora(trained, {"up": other["down"]})
    # A scale that changed since.
    orthogonal = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2, 3, init="orthogonal")}, fn, X)
    start = {"up": dataclasses.replace(orthogonal["up"], b=orthogonal["up"].a[:, :1] + jnp.ones((2, 32)))}
    now = {"up": dataclasses.replace(start["up"], scale=jnp.float32(0.7))}
    plain = lora.to_plain_lora(now, start)["up"]
    np.testing.assert_allclose(added(plain), added(now["up"]) - added(start["up"]), atol=1e-6)


# The randomized decomposition.


def test_sketches_find_the_leading_triplets():
    u, s, v = decomposition.singular_triplets(published()["up"][None], 5, niter=8, key=jax.random.key(0))
    exact = decomposition.singular_triplets(published()["up"][None], 5)
    np.testing.assert_allclose(s, exact[1], rtol=1e-5)
    for one, other in ((u, exact[0]), (v, exact[2])):
        np.testing.assert_allclose(np.abs(np.sum(np.asarray(one * other), axis=2)), 1.0, atol=1e-4)
