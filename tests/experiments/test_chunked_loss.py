"""The chunked cross-entropy: values and gradients of the plain one, less memory, adapted and tied heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments.models.chunked_loss import cross_entropy
from experiments.models.options import Options
from tests.experiments.decoders import expected, load


def plain(head, x, labels):
    logp = jax.nn.log_softmax(head(x).astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels >= 0, -picked, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 5, 100])
def test_values_and_gradients_are_the_plain_ones(getkey, chunk, dtype):
    x = jax.random.normal(getkey(), (2, 10, 8), dtype)
    w = jax.random.normal(getkey(), (8, 13), dtype)
    labels = jax.random.randint(getkey(), (2, 10), 0, 13).at[0, 3:6].set(-100).at[1, 9].set(-1)
    weights = jax.random.uniform(getkey(), labels.shape)

    def loss(losses, x, w):
        each = losses(lambda x: x @ w, x, labels)
        return jnp.sum(each * weights), each

    value = jax.jit(
        lambda x, w: [
            jax.value_and_grad(functools.partial(loss, losses), argnums=(0, 1), has_aux=True)(x, w)
            for losses in (plain, functools.partial(cross_entropy, chunk=chunk))
        ]
    )
    (want, want_grads), (got, got_grads) = value(x, w)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-6)
    assert got[1].dtype == jnp.float32 and np.all(np.asarray(got[1])[np.asarray(labels) < 0] == 0)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05  # sums of bfloat16 in another order
    for a, b in zip(got_grads, want_grads):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


@pytest.mark.parametrize("max_labels", [4, 7, 9, 10, 50])
def test_logits_only_where_there_are_labels(getkey, max_labels):
    x, w = jax.random.normal(getkey(), (3, 10, 8)), jax.random.normal(getkey(), (8, 13))
    labels = jnp.full((3, 10), -100).at[0, 2:6].set(3).at[1, jnp.array([0, 4, 9])].set(5)
    weights = jax.random.uniform(getkey(), labels.shape)
    shapes = []

    def head(w, x):
        shapes.append(x.shape)
        return x @ w

    def loss(x, w, **bound):
        each = cross_entropy(functools.partial(head, w), x, labels, chunk=3, smoothing=0.1, **bound)
        return jnp.sum(each * weights), each

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    bounded = jax.jit(functools.partial(gradient, max_labels=max_labels))(x, w)
    assert {shape[1] for shape in shapes} == {3}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), bounded, jax.jit(gradient)(x, w))


def test_the_head_computes_the_tokens_with_labels_alone():
    x, w, labels = jnp.ones((2, 512, 16)), jnp.ones((16, 64)), jnp.full((2, 512), -1).at[:, 500:].set(1)

    def flops(max_labels):
        def loss(x, w):
            return jnp.sum(cross_entropy(lambda x: x @ w, x, labels, chunk=512, max_labels=max_labels))

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).cost_analysis()["flops"]

    assert flops(16) < 0.2 * flops(None)


def test_more_labels_than_the_bound_are_not_a_number():
    labels = jnp.full((2, 6), -1).at[0, 1:5].set(1).at[1, 3].set(1)
    losses = cross_entropy(lambda x: x, jnp.ones((2, 6, 3)), labels, chunk=6, max_labels=3)
    assert np.isnan(losses[0]).all() and np.isfinite(losses[1]).all()
    with pytest.raises(ValueError, match="max_labels=0, expected at least 1"):
        cross_entropy(lambda x: x, jnp.ones((2, 6, 3)), labels, chunk=6, max_labels=0)


def test_no_pass_holds_all_logits():
    batch, length, width, vocabulary, chunk = 2, 512, 16, 2048, 32
    logits = 4 * batch * length * vocabulary
    x = jax.ShapeDtypeStruct((batch, length, width), jnp.float32)
    w = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def peak(losses):
        def loss(x, w, labels):
            return jnp.sum(losses(lambda x: x @ w, x, labels))

        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, w, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(plain) >= logits
    # logits of one chunk and what the backward pass makes of them, gradients of x and w
    assert peak(functools.partial(cross_entropy, chunk=chunk)) < logits / 4


@pytest.mark.parametrize(
    ("name", "scan", "max_labels"),  # a tied head, a head of its own
    [("gpt2", False, None), ("gpt2", True, 6), ("llama", False, 6), ("llama", True, None)],
)
def test_an_adapted_head_stays_factored(getkey, name, scan, max_labels):
    model = load(name, Options(scan=scan, loss_chunk=5))
    tokens = expected(name)["tokens"]
    labels = jnp.asarray(tokens[:, 1:]).at[1, 4:].set(-100).at[:, 6:].set(-100)
    tokens = jnp.asarray(tokens[:, :-1])
    spec = {r"kernel|token/embedding": lora.LoRA(2, alpha=8)}
    delta = lora.init(getkey(), model.base, spec, model.apply, tokens)
    delta = jax.tree.map(lambda x: x if x.ndim == 0 else 0.3 * jax.random.normal(getkey(), x.shape), delta)
    how = {"labels_BL": labels, "max_labels": max_labels}
    assert "merged" not in str(lora.explain(model.apply, model.base, delta, tokens, **how))
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(model.apply)

    def chunked(train):
        return jnp.mean(adapted(model.base, lora.join(train, frozen), tokens, **how))

    def whole(train):
        logits = adapted(model.base, lora.join(train, frozen), tokens)
        return jnp.mean(plain(lambda x: x, logits, labels))

    (got, got_grads), (want, want_grads) = jax.jit(
        lambda train: (jax.value_and_grad(chunked)(train), jax.value_and_grad(whole)(train))
    )(train)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got_grads, want_grads)


def test_a_chunk_of_nothing():
    with pytest.raises(ValueError, match="chunk=0"):
        cross_entropy(lambda x: x, jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), chunk=0)
