"""Values and gradients of every objective are those of TRL and sentence-transformers, and microbatches add up."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments.models.chunked_loss import cross_entropy
from experiments.objectives.contrastive import contrastive
from experiments.objectives.distillation import distillation
from experiments.objectives.dpo import dpo
from experiments.objectives.grpo import advantages, grpo
from experiments.objectives.kto import kto
from experiments.objectives.log_probabilities import LogProbabilities
from experiments.objectives.orpo import orpo
from experiments.objectives.reference import Frozen
from experiments.objectives.reward import reward
from experiments.objectives.simpo import simpo
from tests.experiments.decoders import load, names

FIXTURES = Path(__file__).parents[1] / "fixtures" / "objectives"


@functools.cache
def stored():
    with np.load(FIXTURES / "expected.npz") as file:
        return {name: jnp.asarray(value) for name, value in file.items()}


def log_probs(base, delta, batch, key):
    """Of a model whose parameters are its logits, three tokens at a time."""
    labels = batch["labels"]
    logits = delta["logits"][..., : labels.size // labels.shape[-1], :, :]
    rows = labels.reshape(-1, labels.shape[-1])
    return -cross_entropy(lambda x: x, logits, rows, chunk=3).reshape(labels.shape)


VARIANTS = {
    "dpo/sigmoid": dpo(log_probs, beta=0.3),
    "dpo/hinge": dpo(log_probs, beta=0.3, kind="hinge"),
    "dpo/ipo": dpo(log_probs, beta=0.3, kind="ipo"),
    "dpo/sigmoid_norm": dpo(log_probs, beta=0.3, length_normalized=True),
    "dpo/robust": dpo(log_probs, beta=0.3, kind="robust", label_smoothing=0.2),
    "dpo/smoothed": dpo(log_probs, beta=0.3, label_smoothing=0.2),
    "orpo": orpo(log_probs, beta=0.7),
    "simpo": simpo(log_probs, beta=2.0, gamma=0.8),
    "simpo/smoothed": simpo(log_probs, beta=2.0, gamma=0.8, label_smoothing=0.1),
}
POLICY_GRADIENTS = {
    "grpo": {},
    "grpo/on_policy": {},
    "grpo/kl": {"beta": 0.04},
    "dapo": {"clip_high": 0.28, "normalize": "tokens"},
    "dr_grpo": {"normalize": "constant", "max_tokens": 7},
}


def pairs(name):
    """Arrays of the chosen and the rejected halves, as pairs."""
    half = stored()[name].shape[0] // 2
    return jnp.stack([stored()[name][:half], stored()[name][half:]], axis=1)


def check(loss, base, delta, batch, name, keys=("gradient",), select=lambda delta: delta["logits"]):
    def mean(delta):
        (total, weight), metrics = loss(base, delta, batch, None)
        return total / weight, metrics

    (value, metrics), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(delta)
    np.testing.assert_allclose(value, stored()[f"{name}/loss"], rtol=1e-5, atol=1e-6)
    want = stored()[f"{name}/{keys[0]}"]
    np.testing.assert_allclose(select(gradient), want[:, : select(gradient).shape[1]], rtol=1e-5, atol=1e-6)
    assert float(jnp.max(jnp.abs(want))) > 1e-3
    return metrics


@pytest.mark.parametrize("name", VARIANTS)
def test_pairs_equal_trl(name):
    batch = {key: pairs(f"pairs/{key}") for key in ("tokens", "labels")}
    # Pairs are rows of two here, and the halves of a batch there.
    base = Frozen({}, {"logits": pairs("pairs/reference").reshape(6, 8, 11)})
    delta = {"logits": pairs("pairs/logits").reshape(6, 8, 11)}
    halves = [0, 2, 4, 1, 3, 5]
    check(VARIANTS[name], base, delta, batch, name, select=lambda delta: delta["logits"][jnp.array(halves)])


def test_log_probabilities_of_the_reference_may_be_in_the_batch():
    batch = {key: pairs(f"pairs/{key}") for key in ("tokens", "labels")}
    delta, reference = ({"logits": pairs(f"pairs/{name}").reshape(6, 8, 11)} for name in ("logits", "reference"))
    batch["reference_log_probs"] = log_probs({}, reference, batch, None)
    select = lambda delta: delta["logits"][jnp.array([0, 2, 4, 1, 3, 5])]  # noqa: E731
    check(VARIANTS["dpo/sigmoid"], {}, delta, batch, "dpo/sigmoid", select=select)


def test_kto_equals_trl():
    batch = {key: pairs(f"rated/{key}") for key in ("tokens", "labels")} | {"desirable": stored()["rated/desirable"]}

    answers, others = stored()["rated/logits"][:3], stored()["rated/logits"][3:]
    wanted = stored()["rated/reference"][:3], stored()["rated/reference"][3:]

    def by_row(base, delta, batch, key):
        # The answers of the batch come first, then those to other prompts.
        of_answers = jnp.all(batch["labels"] == pairs("rated/labels")[:, 0])
        logits = jnp.where(of_answers, delta["logits"][:3], delta["logits"][3:])
        return log_probs(base, {"logits": logits}, batch, key)

    loss = kto(by_row, beta=0.3, desirable_weight=1.2, undesirable_weight=0.8)
    base = Frozen({}, {"logits": jnp.concatenate(wanted)})
    metrics = check(loss, base, {"logits": jnp.concatenate([answers, others])}, batch, "kto")
    np.testing.assert_allclose(metrics["kl"] / 3, stored()["kto/kl"], rtol=1e-5)


@pytest.mark.parametrize(("name", "center"), [("plain", 0.0), ("center", 0.05)])
def test_reward_equals_trl(name, center):
    loss = reward(lambda base, delta, batch, key: delta["scores"].reshape(2, 3).T, center=center)
    batch = {"tokens": jnp.ones((3, 2, 4), jnp.int32), "mask": jnp.ones((3, 2, 4))}
    batch |= {"margin": jnp.array([0.1, 0.0, 0.5])} if center else {}
    delta = {"scores": stored()["scores"]}
    check(loss, {}, delta, batch, f"reward/{name}", select=lambda delta: delta["scores"])


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_policy_gradients_equal_trl(name):
    scale = "none" if name == "dr_grpo" else "group"
    batch = {key: stored()[f"answers/{key}"] for key in ("tokens", "labels")}
    batch["advantages"] = advantages(stored()["answers/rewards"], scale=scale).reshape(-1)
    if name != "grpo/on_policy":
        batch["old_log_probs"] = log_probs({}, {"logits": stored()["answers/old"]}, batch, None)
    base = Frozen({}, {"logits": stored()["answers/reference"]})
    delta = {"logits": stored()["answers/logits"]}
    metrics = check(grpo(log_probs, **POLICY_GRADIENTS[name]), base, delta, batch, name)
    assert (metrics["kl"] > 0) == (name == "grpo/kl")
    assert (metrics["clipped"] > 0) == (name != "grpo/on_policy")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trl(scale):
    got = advantages(stored()["answers/rewards"], scale=scale)
    np.testing.assert_allclose(got, stored()[f"advantages/{scale}"], rtol=1e-5, atol=1e-6)


def logits_decoder(base, tokens, segments, positions, readout):
    return readout(lambda x: x, base["logits"])


@pytest.mark.parametrize(
    ("mix", "temperature", "max_labels"), [(0.0, 1.0, None), (1.0, 1.0, None), (0.5, 1.0, 6), (0.3, 2.0, 6)]
)
def test_distillation_equals_trl(mix, temperature, max_labels):
    batch = {key: stored()[f"taught/{key}"] for key in ("tokens", "labels")}
    base = {"logits": stored()["taught/logits"]}
    delta = lora.init(jax.random.key(0), base, {"logits": lora.Full()}, lambda base: base["logits"] + 0)
    options = {"mix": mix, "temperature": temperature, "chunk": 3, "max_labels": max_labels}
    loss = distillation(logits_decoder, logits_decoder, **options)
    frozen = Frozen(base, {"logits": stored()["taught/reference"]})
    metrics = check(loss, frozen, delta, batch, f"distillation/{mix}", select=lambda d: jax.tree.leaves(d)[0])
    p, q = (jnp.argmax(stored()[f"taught/{name}"], -1) for name in ("logits", "reference"))
    assert int(metrics["agreement"]) == jnp.sum((p == q) & (batch["labels"] >= 0))


@pytest.mark.parametrize(
    ("name", "options"), [("pairs", {}), ("triplets", {"temperature": 0.2}), ("symmetric", {"symmetric": True})]
)
def test_contrastive_equals_sentence_transformers(name, options):
    parts = ("anchors", "positives", "negatives")[: 3 if name == "triplets" else 2]
    delta = {part: stored()[f"embeddings/{part}"] for part in parts}

    def embed(base, delta, tokens, mask, key):
        return delta["anchors"] if tokens.ndim == 2 else jnp.stack([delta[part] for part in parts[1:]], axis=1)

    anchors = jnp.arange(4)[:, None]
    documents = 4 + jnp.arange(4 * (len(parts) - 1)).reshape(4, -1, 1)  # no text is there twice
    batch = {"tokens": anchors, "mask": jnp.ones_like(anchors)}
    batch |= {"document_tokens": documents, "document_mask": jnp.ones_like(documents)}
    for part in parts:
        check(contrastive(embed, **options), {}, delta, batch, f"contrastive/{name}", [part], lambda d, p=part: d[p])


def test_dpo_of_an_adapter_equals_trl_and_peft():
    loaded, (table, _) = load("llama"), names("llama")
    delta = lora.peft.load(FIXTURES / "llama_adapter", loaded.base, table)
    wanted = lora.peft.load(FIXTURES / "llama_gradient", loaded.base, table)
    batch = {key: pairs(f"llama/{key}") for key in ("tokens", "labels")}
    loss = dpo(LogProbabilities(loaded.apply), beta=0.5)
    train, frozen = lora.partition(delta)

    @jax.jit
    def value_and_grad(train):
        def mean(train):
            (total, weight), _ = loss(loaded.base, lora.join(train, frozen), batch, None)
            return total / weight

        return jax.value_and_grad(mean)(train)

    value, gradient = value_and_grad(train)
    np.testing.assert_allclose(value, stored()["llama/loss"], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(gradient), jax.tree.leaves(lora.partition(wanted)[0]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
