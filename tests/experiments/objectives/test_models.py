"""Reward models, embeddings, and a preference step on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from experiments.models import bert, decoder_heads
from experiments.models.options import Options
from experiments.objectives import reward as rewards
from experiments.objectives.contrastive import contrastive, embeddings
from experiments.objectives.dpo import dpo
from experiments.objectives.log_probabilities import LogProbabilities
from experiments.objectives.reference import Frozen
from tests.experiments.decoders import FIXTURES, load

LAYERS = r"(attention|feed_forward)/.*kernel$"


def train(loss, base, delta, batch, steps, lr=2e-2):
    tx = optax.adam(lr)
    state, step = lora.TrainState.create(base, delta, tx, jax.random.key(1)), lora.train_step(loss, tx, has_aux=True)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        history.append(metrics)
    return state, history


def test_a_reward_model_learns_which_text_is_better(lenient):
    """A new `Full` head on the last token, whose position depends on the text, and LoRA below it."""
    model = decoder_heads.load(FIXTURES / "llama", Options(scan=True), classes=1)
    apply, base = lora.nnx.functional(model)
    rng = np.random.default_rng(0)
    tokens, sizes = rng.integers(2, 61, (8, 2, 9)), rng.integers(4, 10, (8, 2))
    tokens[:, 0, 1], tokens[:, 1, 1] = 0, 1  # what makes a text the better one
    mask = np.arange(9) < sizes[..., None]
    batch = {"tokens": jnp.asarray(np.where(mask, tokens, 5), jnp.int32), "mask": jnp.asarray(mask)}
    spec = {**rewards.SPEC, LAYERS: lora.LoRA(2, alpha=8)}
    delta = lora.init(jax.random.key(0), base, spec, apply, batch["tokens"][0], batch["mask"][0])
    score = rewards.scores(apply)
    state, history = train(rewards.reward(score), base, delta, batch, 25)
    assert float(history[0]["loss"]) > 0.5 and float(history[-1]["loss"]) < 0.1
    assert history[-1]["aux"]["accuracy"] == history[-1]["weight"] == 8
    # What follows the last token does not matter.
    others = batch | {"tokens": jnp.where(batch["mask"], batch["tokens"], 7)}
    np.testing.assert_allclose(*(score(state.base, state.delta, each) for each in (batch, others)), atol=1e-5)
    assert type(delta["score/kernel"]).__name__ == "FullAdapter"


def test_embeddings_are_means_of_unit_length_and_learn_pairs(lenient):
    apply, base = lora.nnx.functional(bert.load(FIXTURES / "bert", Options(scan=True)))
    rng = np.random.default_rng(0)
    tokens, documents = (rng.integers(1, 20, shape) for shape in ((6, 7), (6, 2, 5)))
    mask, document_mask = np.arange(7) < rng.integers(3, 8, (6, 1)), np.arange(5) < rng.integers(2, 6, (6, 2, 1))
    batch = {"tokens": tokens, "mask": mask, "document_tokens": documents, "document_mask": document_mask}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    delta = lora.init(jax.random.key(0), base, lora.all_linear(lora.LoRA(2, alpha=8)), apply, tokens, mask)
    embed = embeddings(apply)
    got = embed(base, delta, batch["document_tokens"], batch["document_mask"])
    x = apply(base, batch["document_tokens"][0], batch["document_mask"][0])
    mean = np.array([row[keep].mean(axis=0) for row, keep in zip(np.asarray(x), document_mask[0])])
    np.testing.assert_allclose(got[0], mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-5)
    loss = contrastive(embed)
    padded = {name: jnp.concatenate([value, jnp.zeros_like(value[:2])]) for name, value in batch.items()}
    values = jax.jit(lambda base, delta: [loss(base, delta, each, None)[0] for each in (batch, padded)])(base, delta)
    np.testing.assert_allclose(*values, rtol=1e-5)
    _, history = train(loss, base, delta, padded, 30)
    assert all(np.isfinite(metrics["grad_norm"]) for metrics in history)
    assert float(history[-1]["loss"]) < 0.3 * float(history[0]["loss"])
    assert history[-1]["aux"]["accuracy"] == 6 == history[-1]["weight"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_text_is_not_its_own_negative(symmetric):
    """Pairs 0 and 1 have one positive, 0 and 2 one anchor; the positive of 3 is the anchor of 1, its negative that of
    0. The scores of what is left out do not matter, padding neither."""
    anchors = np.array([[1, 2, 9], [3, 0, 0], [1, 2, 9], [4, 5, 0]])
    documents = np.array([[[6, 7], [8, 0]], [[6, 7], [9, 0]], [[5, 1], [1, 0]], [[3, 0], [6, 7]]])
    left_out = {(0, 1), (0, 2), (0, 7), (1, 0), (1, 3), (1, 7), (2, 0), (2, 1), (2, 7)}
    batch = {"tokens": anchors, "mask": anchors > 0, "document_tokens": documents, "document_mask": documents > 0}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    batch["tokens"] = batch["tokens"].at[3, 2].set(7)  # masked
    rng = np.random.default_rng(0)
    anchor_ND, document_NKD = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in vectors(rng))

    def embed(base, delta, tokens, mask, key):
        return jnp.asarray(anchor_ND if tokens.ndim == 2 else document_NKD)

    scores = np.exp(anchor_ND @ np.swapaxes(document_NKD, 0, 1).reshape(8, -1).T)
    for pair in left_out:
        scores[pair] = 0
    losses = np.log(scores.sum(axis=1) / scores.diagonal())
    if symmetric:
        losses = (losses + np.log(scores[:, :4].sum(axis=0) / scores.diagonal())) / 2
    (total, weight), _ = contrastive(embed, temperature=1, symmetric=symmetric)({}, {}, batch, None)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    assert weight == 4


def vectors(rng):
    """Of four anchors, and of two documents for each."""
    return rng.normal(size=(4, 8)).astype(np.float32), rng.normal(size=(4, 2, 8)).astype(np.float32)


def test_a_step_on_a_mesh_equals_one_on_a_device():
    loaded = load("llama", Options(scan=True, loss_chunk=4))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (8, 2, 12))
    labels = np.where(np.arange(12) >= 5, np.roll(tokens, -1, axis=-1), -1)
    labels[..., -1], labels[7] = -1, -1  # an empty pair
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}
    deltas = [
        lora.init(jax.random.key(seed), loaded.base, {LAYERS: lora.LoRA(2, init="gaussian")}, loaded.apply, tokens[0])
        for seed in (0, 1)
    ]
    tx, loss = optax.sgd(1.0), dpo(LogProbabilities(loaded.apply))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    step, results = lora.train_step(loss, tx, has_aux=True), []
    for put in (lambda tree, _: tree, jax.device_put):
        base, delta, reference = put((loaded.base, *deltas), whole)
        state = lora.TrainState.create(base, delta, tx, jax.random.key(2)).replace(base=Frozen(base, reference))
        state, metrics = step(state, put(batch, split))
        results.append((state.delta, metrics["loss"], metrics["weight"], metrics["aux"]))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert results[1][2] == 7
