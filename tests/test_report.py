"""summary() and explain()."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


def test_roberta_base_counts():
    # RoBERTa-base, r = 8 on query and value: 294,912 trained (the LoRA paper's 0.3M).
    kernel = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    base = {"layers": {str(i): {"query": {"kernel": kernel}, "value": {"kernel": kernel}} for i in range(12)}}
    delta = lora.init(jax.random.key(0), base, {"kernel": lora.LoRA(8, alpha=16, axes=("in", "out"))})
    figures = lora.summary(base, delta)
    assert figures.trainable == 294_912
    assert figures.total == 24 * 768 * 768 + 294_912
    assert figures.base_bytes == figures.full_bytes == 4 * 24 * 768 * 768
    assert figures.delta_bytes == 4 * 294_912 + 24 * 8
    assert [figures.optimizer_bytes(name) for name in ("SGD", "momentum", "Adam")] == [0, 4 * 294_912, 8 * 294_912]
    text = str(figures)
    for part in ("layers/*/query/kernel", "rank=8 alpha=16", "294,912", "2.041 %", "momentum state"):
        assert part in text


def test_groups_by_kind_of_layer():
    base = {
        "h_0": {"w": jnp.ones((4, 4))},
        "h_1": {"w": jnp.ones((4, 4))},
        "conv2d": jnp.ones((4, 4)),
        "b": jnp.ones(4),
    }
    spec = {"w": lora.LoRA(1, axes=("in", "out")), "conv2d": lora.LoRA(2, axes=("in", "out")), "b": lora.Full()}
    groups = lora.summary(base, lora.init(jax.random.key(0), base, spec)).groups
    assert {(group.pattern, group.count, group.trainable) for group in groups} == {
        ("h_*/w", 2, 16),
        ("conv2d", 1, 16),
        ("b", 1, 4),
    }


def test_full_copies_count_once():
    base = {"b": jnp.ones(4), "w": jnp.ones((2, 2))}
    figures = lora.summary(base, lora.init(jax.random.key(0), base, {".": lora.Full()}))
    assert (figures.trainable, figures.total, figures.percent) == (8, 8, 100.0)


W = {"w": jnp.arange(24.0).reshape(4, 6) / 24}
X = jnp.ones((2, 4))


@pytest.mark.parametrize(
    "fn, operation, reason",
    [
        (lambda p, x: x @ jnp.sin(p["w"]), "sin", "no factored form of sin"),
        (lambda p, x: x @ (p["w"] * jnp.cos(jnp.arange(24.0).reshape(4, 6))), "mul", "varies along all"),
        (lambda p, x: x @ p["w"].reshape(6, 4).T, "reshape", "cuts across"),
        (lambda p, x: x @ (p["w"] @ p["w"].T), "dot_general", "both operands"),
        (
            lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: 2 * w, p["w"]),
            "cond",
            "returned from cond",
        ),
        (
            lambda p, x: x @ jax.lax.fori_loop(0, 2, lambda i, w: w * 2, p["w"]),
            "scan",
            "the loop changes it",
        ),
    ],
)
def test_what_has_no_factored_form_is_merged_and_right(fn, operation, reason):
    spec = {"w": lora.LoRA(2, axes=("in", "out"))}
    delta = jax.tree.map(lambda leaf: leaf + 0.2, lora.init(jax.random.key(0), W, spec, fn, X))
    explained = lora.explain(fn, W, delta, X)
    assert not explained.factored
    assert any(use.operation == operation and not use.factored for use in explained["w"]), str(explained)
    assert re.search(reason, str(explained)), str(explained)
    out, expected = lora.adapt(fn)(W, delta, X), fn(lora.merge(W, delta), X)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_a_replaced_leaf_is_explained():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    delta = lora.init(jax.random.key(0), W, {"w": lora.Full()}, fn, X)
    explained = lora.explain(fn, W, delta, X)
    (use,) = explained["w"]
    assert not use.factored and "Full trains the weight itself" in use.reason
    assert str(explained).startswith("w: merged as an input: ")


def test_explain_says_where():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    delta = lora.init(jax.random.key(0), W, {"w": lora.LoRA(1)}, fn, X)
    explained = lora.explain(fn, W, delta, X)
    assert "test_report.py" in explained["w"][0].source
    assert str(explained).startswith("w: factored in dot_general at ")


def test_explain_ragged_under_vmap_says_one_by_one():
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.asarray([1, 1]))  # noqa: E731
    base = {"w": jnp.ones((2, 4, 6))}
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1)}, fn, X)
    assert "one adapter at a time" in str(lora.explain(fn, base, delta, X))


def test_an_unused_adapter():
    delta = lora.init(jax.random.key(0), W, {"w": lora.Full()})
    with pytest.raises(ValueError, match="'w', which the function never uses"):
        lora.explain(lambda p, x: x, W, delta, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ (jnp.split(p["w"], 2, axis=1)[0] * jnp.cos(jnp.arange(12.0).reshape(4, 3))),
        lambda p, x: x @ jnp.tanh(p["w"][:, :3]),
    ],
)
def test_a_part_that_is_changed_before_its_product_is_merged_and_shows_its_roles(fn):
    delta = lora.init(jax.random.key(0), W, {"w": lora.LoRA(2)}, fn, X)
    assert delta["w"].axes == ("in", "out")
    assert not lora.explain(fn, W, delta, X).factored


def test_full_fine_tuning_trains_no_integers():
    base = {"w": jnp.ones((4, 3)), "step": jnp.zeros((), jnp.int32)}
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, axes=("in", "out"))})
    assert lora.summary(base, delta).full_bytes == 48
