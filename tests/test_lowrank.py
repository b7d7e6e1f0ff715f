"""LoRA with a bias on its second factor: scale · bias is added to the outputs."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lora

SCALE = 1.5


def biased(getkey, shape, axes, *, rank=2, blocks=1, dropout=0.0, dtype=jnp.float32, recipe=lora.LoRA):
    """A weight and a LoRA with a bias, all random."""
    base = {"w": jax.random.normal(getkey(), shape, dtype)}
    spec = {"w": recipe(rank, alpha=SCALE * rank, axes=axes, blocks=blocks, dropout=dropout, dtype=dtype)}
    node = lora.init(getkey(), base, spec)["w"]
    lead = node.b.shape[: axes.count("batch") + (len(node.blocks) > 1)]
    bias = jax.random.normal(getkey(), (*lead, *node.b.shape[len(lead) + 1 :]), dtype)
    node = dataclasses.replace(node, b=jax.random.normal(getkey(), node.b.shape, dtype), bias=bias)
    return base, {"w": node}


def without(delta):
    return {path: dataclasses.replace(node, bias=None) for path, node in delta.items()}


def conv(base, x, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, base["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def layers(base, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, base["w"])[1]


def ragged(base, x):
    return lax.ragged_dot(x, base["w"], jnp.array([2, 0, 3]))


def one_by_one(base, x):
    return lax.map(lambda row: row @ base["w"], x)


# The function, the shapes of the weight and of x, axes, blocks, and the bias in terms of the outputs.
CASES = {
    "linear": (lambda base, x: x @ base["w"], (4, 6), (5, 4), ("in", "out"), 1, lambda bias: bias),
    "transposed": (lambda base, x: x @ base["w"].T, (6, 4), (5, 4), ("out", "in"), 1, lambda bias: bias),
    "from the left": (lambda base, x: base["w"] @ x, (6, 4), (4, 5), ("out", "in"), 1, lambda bias: bias[:, None]),
    "jit": (jax.jit(lambda base, x: x @ base["w"]), (4, 6), (5, 4), ("in", "out"), 1, lambda bias: bias),
    "map": (one_by_one, (4, 6), (5, 4), ("in", "out"), 1, lambda bias: bias),
    "vmap": (jax.vmap(lambda base, x: x @ base["w"], (None, 0)), (4, 6), (5, 4), ("in", "out"), 1, lambda bias: bias),
    "checkpoint": (jax.checkpoint(lambda base, x: x @ base["w"]), (4, 6), (5, 4), ("in", "out"), 1, lambda bias: bias),
    "heads": (
        lambda base, x: jnp.einsum("ti,ihd->htd", x, base["w"]),
        (4, 3, 2),
        (5, 4),
        ("in", "out", "out"),
        1,
        lambda bias: bias[:, None],
    ),
    "in axes of heads": (
        lambda base, x: jnp.einsum("thd,hdo->to", x, base["w"]),
        (3, 2, 6),
        (5, 3, 2),
        ("in", "in", "out"),
        1,
        lambda bias: bias,
    ),
    "reshaped": (
        lambda base, x: x @ base["w"].reshape(1, 4, 6)[0],
        (4, 3, 2),
        (5, 4),
        ("in", "out", "out"),
        1,
        lambda bias: bias.reshape(6),
    ),
    "an axis of one": (
        lambda base, x: jnp.einsum("tzi,zio->to", x, base["w"][None]),
        (4, 6),
        (5, 1, 4),
        ("in", "out"),
        1,
        lambda bias: bias,
    ),
    "a part of the outputs": (
        lambda base, x: x @ base["w"][:, 1:5:2],
        (4, 6),
        (5, 4),
        ("in", "out"),
        1,
        lambda bias: bias[1:5:2],
    ),
    "blocks": (
        lambda base, x: jnp.stack([x @ w for w in jnp.split(base["w"], 3, axis=1)]),
        (4, 6),
        (5, 4),
        ("in", "out"),
        3,
        lambda bias: bias[:, None],
    ),
    "adapted blocks": (
        lambda base, x: x @ base["w"],
        (4, 6),
        (5, 4),
        ("in", "out"),
        (True, False, True),
        lambda bias: jnp.concatenate([bias[0], jnp.zeros(2), bias[1]]),
    ),
    "scaled": (lambda base, x: x @ (base["w"] * 2.0), (4, 6), (5, 4), ("in", "out"), 1, lambda bias: 2 * bias),
    "scaled by x": (lambda base, x: x @ (base["w"] * x[0, 0]), (4, 6), (5, 4), ("in", "out"), 1, None),
    "convolution": (conv, (3, 3, 2, 4), (1, 5, 5, 2), ("in", "in", "in", "out"), 1, lambda bias: bias),
    "groups": (
        functools.partial(conv, groups=2),
        (3, 3, 2, 4),
        (1, 5, 5, 4),
        ("in", "in", "in", "out"),
        2,
        lambda bias: bias.reshape(4),
    ),
    "a layer": (lambda base, x: x @ base["w"][1], (3, 4, 4), (5, 4), ("batch", "in", "out"), 1, lambda bias: bias[1]),
    "experts": (
        lambda base, x: jnp.einsum("ti,eio->eto", x, base["w"]),
        (3, 4, 6),
        (5, 4),
        ("batch", "in", "out"),
        1,
        lambda bias: bias[:, None],
    ),
    "ragged": (
        ragged,
        (3, 4, 6),
        (5, 4),
        ("batch", "in", "out"),
        1,
        lambda bias: bias[jnp.array([0, 0, 2, 2, 2])],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_scaled_bias_is_added_to_the_outputs(case, getkey):
    fn, shape, inputs, axes, blocks, placed = CASES[case]
    base, delta = biased(getkey, shape, axes, blocks=blocks)
    x = jax.random.normal(getkey(), inputs)
    if placed is None:
        placed = lambda bias: bias * x[0, 0]  # noqa: E731
    expected = fn(lora.merge(base, without(delta)), x)
    expected += jnp.broadcast_to(SCALE * placed(delta["w"].bias), expected.shape)
    assert lora.explain(fn, base, delta, x).factored
    np.testing.assert_allclose(lora.adapt(fn)(base, delta, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lora.adapt(fn))(base, delta, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", [lora.LoRA, lora.LoRAFA])
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.checkpoint], ids=["scan", "checkpoint"])
def test_outputs_and_gradients_through_a_scan(recipe, transform, getkey):
    base, delta = biased(getkey, (3, 4, 4), ("batch", "in", "out"), recipe=recipe)
    x = jax.random.normal(getkey(), (5, 4))

    def plain(params, x):
        def step(x, parts):
            w, bias = parts
            y = x @ w + jnp.broadcast_to(bias, x.shape)
            return jnp.tanh(y), y

        return lax.scan(step, x, (params["w"], params["bias"]))[1]

    def merged(delta):
        bias = SCALE * delta["w"].bias
        return jnp.sum(jnp.sin(plain(lora.merge(base, without(delta)) | {"bias": bias}, x)))

    adapted = lora.adapt(transform(layers))
    train, frozen = lora.partition(delta)
    assert [leaf.shape for leaf in jax.tree.leaves(train)][-1] == (3, 4)
    loss = lambda fn: lambda train: fn(lora.join(train, frozen))  # noqa: E731
    value, gradient = jax.value_and_grad(loss(lambda delta: jnp.sum(jnp.sin(adapted(base, delta, x)))))(train)
    expected, reference = jax.value_and_grad(loss(merged))(train)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_a_bias_in_bfloat16_keeps_the_dtype(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"), dtype=jnp.bfloat16)
    x = jax.random.normal(getkey(), (5, 4), jnp.bfloat16)
    fn = lora.adapt(lambda base, x: x @ base["w"])
    out = fn(base, delta, x)
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (base, delta, x))
    np.testing.assert_allclose(out.astype(jnp.float32), fn(*wide), rtol=0.05, atol=0.1)


def test_dropout_leaves_the_bias_alone(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"), dropout=0.5)
    fn, x = lambda base, x: x @ base["w"], jax.random.normal(getkey(), (5, 4))
    with_bias, plain = (
        lora.adapt(fn)(base, each, x, dropout_key=jax.random.key(3)) for each in (delta, without(delta))
    )
    assert not np.allclose(plain, lora.adapt(fn)(base, without(delta), x), atol=1e-2)
    np.testing.assert_allclose(with_bias - plain, SCALE * np.tile(delta["w"].bias, (5, 1)), rtol=1e-4, atol=1e-5)


def halves(base, x):
    return x[:, :2] @ base["w"][:2] + x[:, 2:] @ base["w"][2:]


REFUSED = {
    "a part of the inputs": (
        halves,
        r"^'w'.* all of its 4 inputs .*dot_general at test_lowrank.py:\d+ \(halves\).* 2 ",
    ),
    "rows": (lambda base, x: x @ base["w"][jnp.array([0, 1, 1, 3])], r"^'w'.*dot_general.*of other axes too"),
    "copies": (
        lambda base, x: jnp.einsum("ti,zio->to", x, jnp.broadcast_to(base["w"], (2, 4, 6))),
        r"^'w'.*merged here: .*reduce_sum",
    ),
    "the outputs": (lambda base, x: x @ base["w"] @ base["w"].T, r"^'w'.*sums over 6 elements, of other axes too"),
    "a nonlinear function": (
        lambda base, x: x @ jnp.sin(base["w"]),
        r"^'w'.*merged here.*\(sin at test_lowrank.py:\d+",
    ),
    "a row": (lambda base, x: base["w"][1], r"^'w'.*merged"),
    "the weight": (lambda base, x: base["w"], r"^'w'.*merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_are_refused(case, getkey):
    fn, message = REFUSED[case]
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    x = jnp.ones((5, 4))
    with pytest.raises(ValueError, match=message) as error:
        lora.adapt(fn)(base, delta, x)
    assert "bias (of zeros)" in str(error.value)
    lora.adapt(fn)(base, without(delta), x)


def test_no_merged_weight_holds_it(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    merged = lora.merge(base, without(delta))
    for change in (
        lambda: lora.merge(base, delta),
        lambda: lora.unmerge(merged, delta),
        lambda: lora.unmerge(merged, delta, base),
        lambda: lora.switch_task(merged, without(delta), delta),
        lambda: lora.switch_task(merged, without(delta), delta, base),
        lambda: lora.switch_task(merged, delta, without(delta)),
    ):
        with pytest.raises(ValueError, match=r"^'w': .* no merged weight holds"):
            change()
    quantized = lora.quantize({"w": jnp.ones((128, 64))}, {"w": lora.Int8(axes=("in", "out"))})
    _, large = biased(getkey, (128, 64), ("in", "out"))
    with pytest.raises(ValueError, match=r"^'w': .* no merged weight holds"):
        lora.merging.merge_quantized(quantized, large)


def test_a_quantized_base(getkey):
    base, delta = biased(getkey, (128, 64), ("in", "out"))
    base = lora.quantize(base, {"w": lora.NF4(axes=("in", "out"))})
    fn, x = lambda base, x: x @ base["w"], jax.random.normal(getkey(), (5, 128))
    with_bias, plain = (lora.adapt(fn)(base, each, x) for each in (delta, without(delta)))
    np.testing.assert_allclose(with_bias - plain, SCALE * np.tile(delta["w"].bias, (5, 1)), rtol=1e-3, atol=1e-4)


def test_a_dora_has_none(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    dora = lora.init(getkey(), base, {"w": lora.DoRA(2, axes=("in", "out"))})["w"]
    with pytest.raises(ValueError, match=r"DoRA has no bias"):
        lora.merge(base, {"w": dataclasses.replace(dora, bias=delta["w"].bias)})


def test_a_bias_of_another_shape(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    wrong = {"w": dataclasses.replace(delta["w"], bias=jnp.zeros(4))}
    with pytest.raises(ValueError, match=r"bias has the shape \(4,\)"):
        lora.adapt(lambda base, x: x @ base["w"])(base, wrong, jnp.ones((5, 4)))


@pytest.mark.parametrize("axes", [("in", "out"), ("batch", "in", "out")])
def test_saved_and_loaded(axes, getkey, tmp_path):
    base, delta = biased(getkey, (3, 4, 6)[-len(axes) :], axes)
    lora.save(tmp_path / "adapter", delta)
    loaded = lora.load(tmp_path / "adapter", base)
    chex.assert_trees_all_equal(loaded, delta)
    assert "bias=f32" in repr(loaded["w"]) and "bias" not in repr(without(delta)["w"])


def test_members_with_and_without_a_bias(getkey):
    base, one = biased(getkey, (4, 6), ("in", "out"), rank=3)
    _, other = biased(getkey, (4, 6), ("in", "out"))
    members = [without(other), one, {}, other]
    stacked = lora.stack(members, members=5)
    assert stacked["w"].bias.shape == (5, 6)
    fn, x, ids = lambda base, x: x @ base["w"], jax.random.normal(getkey(), (6, 4)), [1, 0, 3, 2, 4, 1]
    expected = [lora.adapt(fn)(base, (*members, {})[i], row) for i, row in zip(ids, x)]
    for grouped in (False, True):
        routed = lora.route(lora.adapt(fn), grouped=grouped)
        np.testing.assert_allclose(routed(base, stacked, ids, x), expected, rtol=1e-5, atol=1e-5)
        # An id that is traced and no member is the base as it is.
        outside = jax.jit(routed)(base, stacked, jnp.full(6, 7), x)
        np.testing.assert_allclose(outside, x @ base["w"], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(lora.unstack(stacked, [without(other), one]), members[:2])
    swapped = lora.swap(stacked, 1, without(other))
    np.testing.assert_allclose(
        lora.route(lora.adapt(fn))(base, swapped, [1] * 6, x),
        [lora.adapt(fn)(base, without(other), row) for row in x],
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match=r"'w'.* adds a bias .*those of the stack do not"):
        lora.swap(lora.stack([without(one)]), 0, one)


def test_vmap_over_members(getkey):
    """Dense and sorted by group: a ragged product runs one member at a time."""
    for fn, shape, axes in (
        (lambda base, x: x @ base["w"], (4, 6), ("in", "out")),
        (ragged, *CASES["ragged"][1::2][:2]),
    ):
        base, one = biased(getkey, shape, axes)
        _, other = biased(getkey, shape, axes)
        x = jax.random.normal(getkey(), (5, 4))
        adapted = lora.adapt(fn)
        out = jax.vmap(adapted, (None, 0, None))(base, lora.stack([one, other]), x)
        np.testing.assert_allclose(out[1], adapted(base, other, x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out[0], adapted(base, one, x), rtol=1e-5, atol=1e-5)


def test_shards(getkey):
    """With the out axis divided each shard has its part of the bias; with an in axis each sum would have all of it."""
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    mesh, x = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,)), jax.random.normal(getkey(), (5, 4))

    def columns(base, x):
        return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P(), P(None, "tensor")), out_specs=P(None, "tensor"))(
            x, base["w"]
        )

    def rows(base, x):
        return jax.shard_map(
            lambda x, w: lax.psum(x @ w, "tensor"), mesh=mesh, in_specs=(P(None, "tensor"), P("tensor")), out_specs=P()
        )(x, base["w"])

    expected = lora.adapt(lambda base, x: x @ base["w"])(base, delta, x)
    np.testing.assert_allclose(lora.adapt(columns)(base, delta, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"^'w'.* all of its 4 inputs .* sums over 2 elements"):
        lora.adapt(rows)(base, delta, x)
    shardings = lora.delta_shardings({"w": jax.NamedSharding(mesh, P(None, "tensor"))}, delta)
    assert shardings["w"].bias.spec == P("tensor")


def test_combined_scaled_and_truncated(getkey):
    base, one = biased(getkey, (4, 6), ("in", "out"), rank=3)
    _, other = biased(getkey, (4, 6), ("in", "out"))
    fn, x = lambda base, x: x @ base["w"], jax.random.normal(getkey(), (5, 4))
    adapted = lora.adapt(fn)
    term = lambda delta: adapted(base, delta, x) - fn(base, x)  # noqa: E731
    expected = 0.7 * term(one) - 0.2 * term(other)
    for options in ({"method": "cat"}, {"method": "svd", "rank": 4}):
        both = lora.combine([one, other], [0.7, -0.2], **options)
        np.testing.assert_allclose(term(both), expected, rtol=1e-4, atol=1e-4)
    mixed = lora.combine([without(one), other], [0.7, -0.2])
    np.testing.assert_allclose(term(mixed), 0.7 * term(without(one)) - 0.2 * term(other), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(term(lora.merging.scale(one, -0.5)), -0.5 * term(one), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        term(lora.truncate(one, 1)),
        term(lora.truncate(without(one), 1)) + SCALE * np.tile(one["w"].bias, (5, 1)),
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(ValueError, match=r"^'w': combine\(method='ties'\).* bias"):
        lora.combine([one, one], [0.5, 0.5], method="ties", density=0.5)


def test_it_trains_without_weight_decay(getkey):
    base, delta = biased(getkey, (4, 6), ("in", "out"))
    train, _ = lora.partition(delta)
    mask = lora.optim.decay_mask(train)["w"]
    assert (mask.a, mask.b, mask.bias) == (True, True, False)
    tx = lora.optim.lora_plus(16.0)
    updates, _ = tx.update(train, tx.init(train), train)
    np.testing.assert_allclose(updates["w"].bias, 16 * train["w"].bias, rtol=1e-6)
    fn, x = lambda base, x: x @ base["w"], jax.random.normal(getkey(), (32, 4))
    adapted = lora.adapt(fn)
    target = fn(base, x) + 2.0
    start = {"w": jax.tree.map(jnp.zeros_like, delta["w"])}
    start = {"w": dataclasses.replace(start["w"], scale=delta["w"].scale)}
    tx = optax.sgd(0.5)
    step = lora.train_step(lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - target) ** 2), tx)
    state = lora.TrainState.create(base, start, tx, getkey())
    for _ in range(30):
        state, _ = step(state, x)
    np.testing.assert_allclose(SCALE * state.delta["w"].bias, 2.0, rtol=1e-3)
