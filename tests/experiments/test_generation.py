"""Generation: what transformers generates, padding on any side, base + delta, filters, and the edges of a cache."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments import generation
from experiments.generation import ngrams, sampling
from experiments.models import chunked_loss
from experiments.models.options import Options
from tests.experiments.decoders import ALL, FIXTURES, expected, load

PAD, NEW, SLOTS = 1, 10, 18  # nine tokens of the longest prompt, and nine that are read again
BEAMS = {
    "beams": {"beams": 3, "length_penalty": 2.0},
    "short_beams": {"beams": 4, "length_penalty": -1.0},
    "beams_no_repeat": {"beams": 3, "no_repeat": 2},
    "beams_early": {"beams": 3, "early_stopping": True},
}


def arguments(name, model, side="left", rows=slice(None)):
    """What all ways to generate are given."""
    want = expected(name)
    prompts, mask = want[f"prompts_{side}"][rows], want[f"mask_{side}"][rows].astype(bool)
    return (model.step, model.base, prompts, mask), {
        "cache": model.model.cache(len(prompts), SLOTS),
        "new_tokens": NEW,
        "pad": PAD,
        "eos": tuple(want["eos"].tolist()),
    }


@pytest.mark.parametrize("name", ALL)
def test_greedy_continuations_are_those_of_transformers(name):
    args, how = arguments(name, load(name))
    np.testing.assert_array_equal(generation.greedy(*args, **how | {"eos": None}), expected(name)["greedy"])


# every search with two models, and with the others the one that needs most
@pytest.mark.parametrize(
    ("name", "search"),
    [(name, search) for name in ("gpt2", "llama") for search in BEAMS]
    + [(name, "beams_no_repeat") for name in ALL if name not in ("gpt2", "llama")],
)
def test_beam_searches_are_those_of_transformers(name, search):
    args, how = arguments(name, load(name))
    beams = generation.beam_search(*args, **how, **BEAMS[search])
    np.testing.assert_array_equal(beams.tokens_BKN[:, 0], expected(name)[search])
    assert np.all(np.diff(beams.scores_BK, axis=1) <= 0)


def test_a_score_is_the_log_probability_of_its_text():
    model = load("llama")
    args, how = arguments("llama", model, rows=slice(2, 3))  # the longest prompt: no padding
    beams = generation.beam_search(*args, **how | {"eos": None}, **BEAMS["beams"])
    text = jnp.concatenate([args[2], beams.tokens_BKN[:, 0]], axis=1)
    losses = model.jitted(model.base, text[:, :-1], labels_BL=text[:, 1:])[:, -NEW:]
    np.testing.assert_allclose(beams.scores_BK[:, 0], -losses.sum(1) / NEW**2.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_ends_padding_and_layers_change_no_continuation(name):
    want = expected(name)["greedy_eos"]
    model, scanned = load(name), load(name, Options(scan=True))
    for case in (
        arguments(name, model),
        arguments(name, model, "right"),
        arguments(name, scanned, "right"),
    ):
        args, how = case
        np.testing.assert_array_equal(generation.greedy(*args, **how), want)
    (step, base, prompts, mask), how = arguments(name, model, rows=slice(1))  # the first prompt alone
    alone = prompts[:, mask[0]]
    np.testing.assert_array_equal(generation.greedy(step, base, alone, **how), want[:1])
    beams = generation.beam_search(step, base, alone, **how, **BEAMS["beams_no_repeat"])
    np.testing.assert_array_equal(beams.tokens_BKN[:, 0], expected(name)["beams_no_repeat"][:1])


def test_no_token_twice():
    args, how = arguments("gpt2", load("gpt2"))
    continuations = np.asarray(generation.greedy(*args, **how | {"eos": None}, no_repeat=1))
    for prompt, mask, row in zip(args[2], args[3], continuations):
        text = [*prompt[mask], *row]
        assert len(set(row)) == NEW and set(row).isdisjoint(text[: -len(row)])


def test_only_what_is_generated_is_not_repeated():
    model = load("gpt2")
    (step, base, prompts, mask), how = arguments("gpt2", model)
    how |= {"eos": None, "no_repeat": 2, "prompt_repeats": True}
    texts = generation.greedy(step, base, prompts, mask, **how)
    for row in np.asarray(texts):
        pairs = list(itertools.pairwise(row.tolist()))
        assert len(set(pairs)) == len(pairs)
    beams = generation.beam_search(step, base, prompts, mask, **how, beams=3).tokens_BKN
    # The cache may hold the beginning of the prompts.
    begun = generation.prefill(step, base, prompts[:, :-1], mask[:, :-1], cache=how.pop("cache"))
    last = prompts[:, -1:]
    np.testing.assert_array_equal(generation.greedy(step, base, last, cache=begun, **how), texts)
    again = generation.beam_search(step, base, last, cache=begun, **how, beams=3).tokens_BKN
    np.testing.assert_array_equal(again, beams)
    assert (beams[:, 0] != texts).any()


def test_base_and_delta_generate_what_merged_weights_generate(getkey):
    model = load("llama")
    args, how = arguments("llama", model)
    base = model.base
    spec = {r"kernel|embedding": lora.LoRA(2, alpha=64)}
    delta = lora.init(getkey(), base, spec, model.apply, args[2])
    delta = jax.tree.map(lambda x: x if x.ndim == 0 else 0.3 * jax.random.normal(getkey(), x.shape), delta)
    merged = lora.merge(base, delta)
    step = generation.make_step(lora.adapt(model.apply))
    together = generation.greedy(step, (base, delta), *args[2:], **how)
    np.testing.assert_array_equal(together, generation.greedy(model.step, merged, *args[2:], **how))
    assert (np.asarray(together) != expected("llama")["greedy_eos"]).any()
    results = [
        generation.beam_search(step, params, *args[2:], **how, **BEAMS["beams"])
        for step, params in ((step, (base, delta)), (model.step, merged))
    ]
    np.testing.assert_array_equal(results[0].tokens_BKN, results[1].tokens_BKN)


def test_a_quantized_base_with_an_adapter_generates_as_its_merged_weights():
    model = load("llama")
    args, how = arguments("llama", model)
    rules = {"layers/.*kernel": lora.NF4(block=8)}
    base = lora.quantize(model.base, rules, model.apply, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    spec = {"layers/.*kernel": lora.LoRA(2, init="orthogonal")}
    delta = lora.init(jax.random.key(0), base, spec, model.apply, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    step = generation.make_step(lora.adapt(model.apply))
    continuations = generation.greedy(step, (base, delta), *args[2:], **how)
    np.testing.assert_array_equal(
        continuations, generation.greedy(model.step, lora.merge(base, delta), *args[2:], **how)
    )


def test_samples_follow_key_temperature_and_filters(getkey):
    args, how = arguments("llama", load("llama"))
    how |= {"eos": None}
    key = getkey()
    first = generation.sample(key, *args, **how, top_k=5, top_p=0.9)
    np.testing.assert_array_equal(first, generation.sample(key, *args, **how, top_k=5, top_p=0.9))
    assert (np.asarray(first) != np.asarray(generation.sample(getkey(), *args, **how, top_k=5, top_p=0.9))).any()
    cold = generation.sample(key, *args, **how, top_k=5, top_p=0.9, temperature=1e-4)
    np.testing.assert_array_equal(cold, expected("llama")["greedy"])


def test_samples_are_drawn_by_their_probability(getkey):
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    rows = 4000

    def step(params, tokens, mask, cache):
        return jnp.broadcast_to(params[None], (rows, 4)), cache

    cache = load("llama").model.cache(rows, 1)
    drawn = generation.sample(getkey(), step, logits, jnp.zeros((rows, 1), jnp.int32), cache=cache, new_tokens=1)
    shares = np.bincount(np.asarray(drawn)[:, 0], minlength=4) / rows
    np.testing.assert_allclose(shares, np.exp(logits), atol=4 * np.sqrt(0.25 / rows))  # four standard errors


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("temperature", {"temperature": 0.7}),
        ("top_k", {"top_k": 7}),
        ("top_p", {"top_p": 0.8}),
        ("top_p_small", {"top_p": 0.01}),
        ("all", {"temperature": 1.5, "top_k": 20, "top_p": 0.6}),
    ],
)
def test_filters_are_those_of_transformers(name, how):
    with np.load(FIXTURES / "sampling.npz") as file:
        np.testing.assert_allclose(generation.filter_logits(jnp.asarray(file["scores"]), **how), file[name], rtol=1e-6)


def test_filters_beyond_the_vocabulary_keep_all():
    logits = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(generation.filter_logits(logits, top_k=9, top_p=1.0), logits)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_forbidden_repeats_are_those_of_transformers(size):
    with np.load(FIXTURES / "sampling.npz") as file:
        scores, history = jnp.asarray(file["scores"]), jnp.asarray(file["history"].astype(np.int32))
        rows, length = history.shape
        # padding before a text and room behind it are no part of it
        text = jnp.pad(history, ((0, 0), (2, 3)))
        begins = jnp.full(rows, 2)
        scores_after = generation.forbid_repeats(scores, text, begins, length + 2, size)
        np.testing.assert_array_equal(scores_after, file[f"no_repeat_{size}"])


def test_short_texts_forbid_nothing():
    scores, text = jnp.zeros((1, 4)), jnp.array([[1, 1, 0, 0]])
    for size in (0, 3, 5):
        np.testing.assert_array_equal(generation.forbid_repeats(scores, text, jnp.array([0]), 2, size), scores)


def test_parameters_are_no_constants_of_what_is_compiled():
    model = load("llama")
    args, how = arguments("llama", model)
    greedy = jax.jit(lambda base, cache: generation.greedy(model.step, base, *args[2:], **how | {"cache": cache}))
    closed = greedy.trace(model.base, how["cache"]).jaxpr
    largest = max(leaf.size for leaf in jax.tree.leaves(model.base))
    assert all(np.size(const) < largest for const in closed.consts)


def test_what_cannot_be_generated_is_refused(getkey):
    model = load("gpt2")
    args, how = arguments("gpt2", model)
    with pytest.raises(ValueError, match="3 rows and 17 slots, 0 of them used; expected 3 rows and 18 slots: 9 tokens"):
        generation.greedy(*args, **how | {"cache": model.model.cache(3, 17)})
    _, used = model.jitted(model.base, args[2], args[3], cache=how["cache"])
    with pytest.raises(ValueError, match="18 slots, 9 of them used; expected 3 rows and 27 slots: 9 used ones, 9 tok"):
        generation.beam_search(*args, **how | {"cache": used}, beams=2)
    with pytest.raises(ValueError, match="no_repeat=2 compares with all tokens of a text, but the cache holds only"):
        generation.greedy(*args, **how | {"cache": used}, no_repeat=2)
    with pytest.raises(ValueError, match="The prompts have no tokens"):
        generation.greedy(model.step, model.base, args[2][:, :0], **how)
    with pytest.raises(ValueError, match="3 rows and 18 slots, 9 of them used; expected 2 rows and 11 slots"):
        generation.prefill(model.step, model.base, args[2][:2, :2], cache=used)
    with pytest.raises(ValueError, match="new_tokens=0"):
        generation.greedy(*args, **how | {"new_tokens": 0})
    for name, value in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.5)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            generation.sample(getkey(), *args, **how, **{name: value})
    with pytest.raises(ValueError, match="beams=0"):
        generation.beam_search(*args, **how, beams=0)
    with pytest.raises(ValueError, match="early_stopping='soon'"):
        generation.beam_search(*args, **how, beams=2, early_stopping="soon")
    with pytest.raises(ValueError, match="30 beams with 2 end tokens need 90 tokens, got 61"):
        generation.beam_search(*args, **how, beams=30)
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        model.model.cache(1, 33)


@pytest.mark.parametrize("module", [ngrams, sampling, chunked_loss], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
