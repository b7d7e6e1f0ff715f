"""Objectives on tiny models: the first step, microbatches, padding, references, teachers and samples."""

import doctest
import importlib
import math
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.cases import RECIPES

import lora_jax as lora
from experiments import generation, objectives
from experiments.models.options import Options
from experiments.objectives.distillation import distillation
from experiments.objectives.dpo import dpo
from experiments.objectives.grpo import advantages, grpo
from experiments.objectives.kto import kto
from experiments.objectives.log_probabilities import LogProbabilities
from experiments.objectives.orpo import orpo
from experiments.objectives.reference import Frozen, log_ratios
from experiments.objectives.rollouts import rollouts, sample_group
from experiments.objectives.simpo import simpo
from tests.experiments.decoders import load

LENGTH, VOCABULARY = 12, 61
MODULES = [module.name for module in pkgutil.iter_modules(objectives.__path__, "experiments.objectives.")]
LAYERS = r"(attention|feed_forward)/.*kernel$"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert not results.failed and results.attempted


def model(dtype=jnp.float32):
    return load("llama", Options(scan=True, loss_chunk=4, dtype=dtype))


def pairs(count=4, seed=0):
    """Pairs with prompts and answers of different lengths."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (count, 2, LENGTH + 1))
    prompts, ends = rng.integers(2, 6, (count, 1, 1)), rng.integers(8, LENGTH + 1, (count, 2, 1))
    positions = np.arange(1, LENGTH + 1)
    labels = np.where((positions >= prompts) & (positions < ends), tokens[..., 1:], -1)
    return {"tokens": jnp.asarray(tokens[..., :-1], jnp.int32), "labels": jnp.asarray(labels, jnp.int32)}


def adapter(recipe, pattern=LAYERS, *, moved=0.0, seed=0):
    loaded = model()
    delta = lora.init(jax.random.key(seed), loaded.base, {pattern: recipe}, loaded.apply, pairs()["tokens"][0])
    train, frozen = lora.partition(delta)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return lora.join(jax.tree.map(lambda x: x + moved * jax.random.normal(next(keys), x.shape, x.dtype), train), frozen)


@pytest.mark.parametrize("name", RECIPES)
def test_at_the_first_step_the_policy_is_the_reference(name):
    loaded, batch = model(), pairs()
    delta = adapter(RECIPES[name](), r"^token/embedding$" if name == "Rows" else LAYERS)
    log_probs = LogProbabilities(loaded.apply)

    @jax.jit
    def compare(base, delta, snapshot):
        values = []
        for frozen in (base, Frozen(base, snapshot)):
            (total, weight), _ = dpo(log_probs)(frozen, delta, batch, None)
            values.append((jnp.max(jnp.abs(log_ratios(log_probs, frozen, delta, batch, None))), total / weight))
        return values

    (difference, loss), (of_snapshot, loss_of_snapshot) = compare(loaded.base, delta, delta)
    assert difference < 1e-4
    assert abs(loss - math.log(2)) < 1e-6
    assert of_snapshot == 0 and loss_of_snapshot == np.float32(math.log(2))


def test_training_starts_at_log_2_and_moves_away_from_the_snapshot(lenient):
    """In the compiled, differentiated step, in bfloat16; the snapshot is not donated or changed."""
    loaded, batch = model(jnp.bfloat16), pairs()
    delta, tx = adapter(lora.DoRA(2, alpha=4), moved=0.1), optax.adam(1e-2)
    loss = dpo(LogProbabilities(loaded.apply))
    state = lora.TrainState.create(loaded.base, delta, tx, jax.random.key(1))
    state, step = state.replace(base=Frozen(loaded.base, delta)), lora.train_step(loss, tx, has_aux=True)
    losses = []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == np.float32(math.log(2)) and losses[-1] < losses[0] - 0.05
    assert metrics["weight"] == 4 and metrics["aux"]["accuracy"] == 4
    assert all(map(np.array_equal, jax.tree.leaves(state.base.reference), jax.tree.leaves(delta)))


def test_bfloat16_differs_from_the_base_as_two_compilations_of_the_base():
    loaded, batch = model(jnp.bfloat16), pairs()
    log_probs = LogProbabilities(loaded.apply)
    lowered = jax.jit(lambda base, batch: log_probs(base, {}, batch)).lower(loaded.base, batch)
    values = [
        lowered.compile(compiler_options={"xla_allow_excess_precision": excess})(loaded.base, batch)
        for excess in (True, False)
    ]
    spread = jnp.max(jnp.abs(values[0] - values[1]))
    ratios = jax.jit(lambda base, delta: log_ratios(log_probs, base, delta, batch, None))
    difference = jnp.max(jnp.abs(ratios(loaded.base, adapter(lora.LoRA(2)))))
    assert 0 < spread < 0.5 and difference <= spread


def test_a_base_that_prepare_changed_is_no_reference():
    loaded, batch = model(), pairs()
    spec = {r"query/kernel$": lora.LoRA(2, init="pissa")}
    base, delta = lora.prepare(jax.random.key(0), loaded.base, spec, loaded.apply, [(batch["tokens"][0],)])
    loss = dpo(LogProbabilities(loaded.apply))
    with pytest.raises(ValueError, match=r"moved a part of this weight into its adapter.*snapshot of the delta"):
        loss(base, delta, batch, None)
    (total, weight), _ = jax.jit(loss)(Frozen(base, delta), delta, batch, None)
    assert total / weight == np.float32(math.log(2))


def answers(batch):
    """Answers one by one, as a policy-gradient batch."""
    rows = {name: value.reshape(-1, LENGTH) for name, value in batch.items()}
    return rows | {"advantages": jnp.linspace(-1, 1, len(rows["tokens"]))}


def objective(name):
    log_probs = LogProbabilities(model().apply)
    return {
        "dpo": dpo(log_probs),
        "ipo": dpo(log_probs, kind="ipo"),
        "simpo": simpo(log_probs),
        "orpo": orpo(log_probs),
        "kto": kto(log_probs),
        "grpo": grpo(log_probs, beta=0.1),
        "dapo": grpo(log_probs, clip_high=0.28, normalize="tokens"),
        "dr_grpo": grpo(log_probs, normalize="constant", max_tokens=10),
        "distillation": distillation(model().apply, mix=0.5, chunk=4),
    }[name]


def batch_for(name):
    if name in ("grpo", "dapo", "dr_grpo"):
        return answers(pairs())
    if name == "distillation":
        return answers(pairs())
    return pairs() | ({"desirable": jnp.array([True, False, True, True])} if name == "kto" else {})


@pytest.mark.parametrize("name", ["dpo", "grpo", "dapo", "dr_grpo", "distillation"])
def test_microbatches_add_up_and_padding_counts_nowhere(name):
    batch, delta, loss = batch_for(name), adapter(lora.LoRA(2), moved=0.2), objective(name)
    base = Frozen(model().base, adapter(lora.LoRA(2), moved=0.2, seed=5))
    empty = jax.tree.map(lambda x: jnp.full_like(x, -1) if x.dtype == jnp.int32 else x, batch)
    empty["tokens"] = jnp.zeros_like(batch["tokens"])
    padded = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, empty)

    @jax.jit
    def by_parts(base, delta, padded):
        tx = optax.sgd(1.0)
        results = []
        for each, accumulate in ((batch, 1), (padded, 2)):
            state = lora.TrainState(base, delta, tx.init(lora.partition(delta)[0]), jnp.int32(0), jax.random.key(0))
            step = lora.train_step(loss, tx, accumulate=accumulate, has_aux=True, donate=False)
            state, metrics = step(state, each)
            results.append((state.delta, metrics["loss"], metrics["weight"]))
        return results

    whole, other = by_parts(base, delta, padded)
    assert whole[1] != 0
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["orpo", "kto"])
def test_padding_counts_nowhere(name):
    batch, delta, loss = batch_for(name), adapter(lora.LoRA(2), moved=0.2), objective(name)
    base = Frozen(model().base, adapter(lora.LoRA(2), moved=0.2, seed=5))
    empty = jax.tree.map(lambda x: jnp.full_like(x, -1) if x.dtype == jnp.int32 else x, batch)
    empty["tokens"] = jnp.zeros_like(batch["tokens"])
    padded = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch, empty)
    train, frozen = lora.partition(delta)
    gradients = jax.jit(jax.grad(lambda train, batch: loss(base, lora.join(train, frozen), batch, None)[0][0]))
    for a, b in zip(jax.tree.leaves(gradients(train, batch)), jax.tree.leaves(gradients(train, padded)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.isfinite(b).all()


def test_neither_base_nor_reference_is_a_constant_of_the_step():
    loaded, delta, tx = model(), adapter(lora.LoRA(2), moved=0.1), optax.sgd(0.1)
    state = lora.TrainState.create(loaded.base, delta, tx, jax.random.key(0))
    state = state.replace(base=Frozen(loaded.base, adapter(lora.LoRA(2), moved=0.1, seed=9)))
    text = lora.train_step(objective("dpo"), tx, has_aux=True).lower(state, pairs()).as_text()
    assert 'dense<"0x' not in text and len(text) < 1_000_000


def test_distillation_to_the_policy_itself_another_delta_and_another_model():
    loaded, batch = model(), answers(pairs())
    delta, other = adapter(lora.LoRA(2), moved=0.3), adapter(lora.DoRA(2), moved=0.3, seed=4)
    merged = lora.merge(loaded.base, other)
    same = distillation(loaded.apply, chunk=4)
    another = distillation(loaded.apply, model().apply, chunk=5, max_labels=LENGTH)
    longer = {f"teacher_{name}": jnp.pad(batch[name], ((0, 0), (0, 3)), constant_values=-1) for name in ("labels",)}
    longer["teacher_tokens"] = jnp.pad(batch["tokens"], ((0, 0), (0, 3)))

    @jax.jit
    def values(base, delta, other, merged):
        return [
            same(Frozen(base, delta), delta, batch, None)[0][0],
            same(Frozen(base, other), delta, batch, None)[0][0],
            another(Frozen(base, merged), delta, batch, None)[0][0],
            another(Frozen(base, Frozen(base, other)), delta, batch | longer, None)[0][0],
            distillation(loaded.apply, max_labels=1)(base, delta, batch, None)[0][0],
        ]

    itself, of_delta, of_model, of_longer, too_few = values(loaded.base, delta, other, merged)
    assert abs(itself) < 1e-4 and of_delta > 0.1
    np.testing.assert_allclose(of_model, of_delta, rtol=1e-4)
    np.testing.assert_allclose(of_longer, of_delta, rtol=1e-4)
    assert np.isnan(too_few)


@pytest.mark.parametrize("length", [1, 3])
def test_prompts_of_a_group_are_read_once(length):
    loaded = model()
    step = generation.make_step(loaded.apply)
    prompts, mask = jnp.array([[0, 5, 6], [7, 8, 9]])[:, -length:], jnp.array([[False, True, True], [True] * 3])
    mask, key, options = mask[:, -length:], jax.random.key(0), {"new_tokens": 4, "eos": 2, "temperature": 2.0}
    new = sample_group(key, step, loaded.base, prompts, mask, cache=loaded.model.cache(2, 7), group=3, **options)
    repeated = [jnp.repeat(array, 3, axis=0) for array in (prompts, mask)]
    expected = generation.sample(key, step, loaded.base, *repeated, cache=loaded.model.cache(6, 7), **options)
    assert new.tolist() == expected.tolist() and len({*map(tuple, new.tolist())}) > 2
    begun = generation.prefill(step, loaded.base, jnp.array([[4, 3]]), cache=loaded.model.cache(1, 9), copies=2)
    after = sample_group(key, step, loaded.base, prompts, mask, cache=begun, group=3, **options)
    beginning = jnp.array([[4, 3]] * 2)
    whole = jnp.concatenate([beginning, prompts], axis=1), jnp.concatenate([jnp.ones((2, 2), bool), mask], axis=1)
    expected = sample_group(key, step, loaded.base, *whole, cache=loaded.model.cache(2, 9), group=3, **options)
    assert after[3:].tolist() == expected[3:].tolist()  # the first prompt has padding inside, which is no prompt


def test_rollouts_learn_a_rewarded_token(lenient):
    """Samples of base and delta, groups of answers, GRPO: the mean reward rises."""
    loaded, delta, tx = model(), adapter(lora.LoRA(2, alpha=8)), optax.adam(5e-2)
    adapted = lora.adapt(loaded.apply)
    sampler, log_probs = generation.make_step(adapted), LogProbabilities(loaded.apply)
    prompts = jnp.array([[0, 5, 6], [7, 8, 9]])
    mask = jnp.array([[False, True, True], [True, True, True]])
    state = lora.TrainState.create(loaded.base, delta, tx, jax.random.key(0))
    step = lora.train_step(grpo(log_probs, normalize="tokens", clip_high=0.28), tx, has_aux=True)
    rewards = []
    for number in range(12):
        batch = rollouts(
            jax.random.key(number), sampler, (state.base, state.delta), prompts, mask,
            cache=loaded.model.cache(2, 7), group=8, new_tokens=4, eos=2,
        )  # fmt: skip
        answer = jnp.where(batch["segments"][:, 3:] > 0, batch["tokens"][:, 3:], -1)
        reward = jnp.mean(answer % 2 == 0, axis=1, where=answer >= 0)
        rewards.append(float(reward.mean()))
        if not number:  # what a sampled token's probability is
            values = jax.jit(log_probs)(state.base, state.delta, batch, None)
            assert (values[batch["labels"] >= 0] < 0).all()
            assert (jnp.sum(batch["labels"] >= 0, axis=1) == jnp.sum(answer >= 0, axis=1)).all()
        batch["advantages"] = advantages(reward.reshape(2, 8)).reshape(-1)
        state, _ = step(state, batch)
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpo(None, beta=0), "beta=0"),
        (lambda: dpo(None, label_smoothing=0.5), "below 0.5"),
        (lambda: dpo(None, kind="other"), "expected one of sigmoid, robust, hinge, ipo"),
        (lambda: simpo(None, beta=-1), "beta=-1"),
        (lambda: orpo(None, likelihood="all"), "expected text or answer"),
        (lambda: grpo(None, clip=0.0), "clip=0.0"),
        (lambda: grpo(None, normalize="constant"), "needs max_tokens"),
        (lambda: advantages(jnp.ones((4, 1))), r"\[prompts, 2 or more\]"),
        (lambda: distillation(None, mix=2), "mix=2"),
        (lambda: dpo(None)({}, {}, {"labels": jnp.ones((4, 3))}, None), r"\[examples, 2, tokens\]"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
