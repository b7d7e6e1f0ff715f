"""A prefilled cache continues as the whole prompt does: for every family, padding on either side, and all searches."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments import generation
from experiments.generation import prefixes
from experiments.models.options import Options
from tests.experiments.decoders import ALL, expected, load

NEW, SLOTS = 6, 32


def whole_and_rest(name, side, shared=5):
    """Prompts that begin with the same tokens: whole, with their padding on the left; and what follows these tokens."""
    want = expected(name)
    prefix = np.asarray([[7, 3, 11, 2, 9][:shared]])
    prompts, mask = want[f"prompts_{side}"], want[f"mask_{side}"].astype(bool)
    rows = [[*prefix[0], *prompt[keep]] for prompt, keep in zip(prompts, mask)]
    longest = max(map(len, rows))
    whole = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    whole_mask = np.array([[False] * (longest - len(row)) + [True] * len(row) for row in rows])
    return jnp.asarray(prefix, jnp.int32), (whole, whole_mask), (prompts, mask)


@pytest.mark.parametrize(("name", "side"), [*((name, "right") for name in ALL), ("gpt2", "left"), ("llama", "left")])
def test_a_shared_beginning_changes_no_continuation(name, side):
    model = load(name)
    prefix, whole, rest = whole_and_rest(name, side)
    want = generation.greedy(model.step, model.base, *whole, cache=model.model.cache(3, SLOTS), new_tokens=NEW)
    shared = generation.prefill(model.step, model.base, prefix, cache=model.model.cache(1, SLOTS), copies=3)
    got = generation.greedy(model.step, model.base, *rest, cache=shared, new_tokens=NEW)
    np.testing.assert_array_equal(got, want)
    wanted, _ = model.jitted(model.base, *whole, cache=model.model.cache(3, SLOTS), last=True)
    aligned = generation.prompts.align(*map(jnp.asarray, rest))
    logits, _ = model.jitted(model.base, *aligned, cache=shared, last=True)
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_searches_and_samples_continue_a_prefilled_cache(getkey):
    model = load("llama", Options(scan=True))
    prefix, whole, rest = whole_and_rest("llama", "left")
    empty = model.model.cache(3, SLOTS)
    shared = generation.prefill(model.step, model.base, prefix, cache=model.model.cache(1, SLOTS), copies=3)
    how = {"new_tokens": NEW, "eos": (4,)}
    beams, wanted = (
        generation.beam_search(model.step, model.base, *inputs, cache=cache, beams=2, **how)
        for inputs, cache in ((rest, shared), (whole, empty))
    )
    np.testing.assert_array_equal(beams.tokens_BKN, wanted.tokens_BKN)
    np.testing.assert_allclose(beams.scores_BK, wanted.scores_BK, rtol=1e-4)
    key = getkey()
    sampled, wanted = (
        generation.sample(key, model.step, model.base, *inputs, cache=cache, top_k=3, **how)
        for inputs, cache in ((rest, shared), (whole, empty))
    )
    np.testing.assert_array_equal(sampled, wanted)


def test_several_samples_of_each_prompt_share_its_cache(getkey):
    model = load("qwen2")
    _, (whole, mask), _ = whole_and_rest("qwen2", "left")
    key = getkey()
    copies = [jnp.repeat(jnp.asarray(x), 2, axis=0) for x in (whole, mask)]
    want = generation.sample(
        key, model.step, model.base, *copies, cache=model.model.cache(6, SLOTS), new_tokens=NEW, top_k=3
    )
    cache = model.model.cache(3, SLOTS)
    for part in (slice(0, 4), slice(4, whole.shape[1] - 1)):  # in pieces
        copied = 2 if part.start else 1
        cache = generation.prefill(model.step, model.base, whole[:, part], mask[:, part], cache=cache, copies=copied)
    got = generation.sample(key, model.step, model.base, copies[0][:, -1:], cache=cache, new_tokens=NEW, top_k=3)
    np.testing.assert_array_equal(got, want)


def test_losses_continue_a_prefilled_cache():
    model = load("llama")
    prefix, (whole, mask), (prompts, rest_mask) = whole_and_rest("llama", "right")
    labels = np.where(rest_mask, np.roll(prompts, -1, axis=1), -1)
    shared = generation.prefill(model.step, model.base, prefix, cache=model.model.cache(1, SLOTS), copies=3)
    losses, _ = model.jitted(model.base, prompts, rest_mask, labels_BL=labels, cache=shared)
    all_labels = np.full(whole.shape, -1)
    starts = np.argmax(mask, axis=1) + prefix.shape[1]
    for row, start in enumerate(starts):
        all_labels[row, start:] = labels[row][rest_mask[row]]
    wanted = model.jitted(model.base, whole, mask, labels_BL=all_labels)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(losses[row][rest_mask[row]], wanted[row, start:], rtol=1e-4, atol=1e-5)


def test_a_delta_and_a_quantized_base_continue_their_own_cache(getkey):
    model = load("llama")
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    base = lora.quantize(model.base, {"layers/.*kernel": lora.NF4(block=8)}, model.apply, example)
    delta = lora.init(getkey(), base, {"layers/.*kernel": lora.LoRA(2, init="orthogonal")}, model.apply, example)
    step = generation.make_step(lora.adapt(model.apply))
    prefix, whole, rest = whole_and_rest("llama", "left")
    want = generation.greedy(step, (base, delta), *whole, cache=model.model.cache(3, SLOTS), new_tokens=NEW)
    shared = generation.prefill(step, (base, delta), prefix, cache=model.model.cache(1, SLOTS), copies=3)
    np.testing.assert_array_equal(generation.greedy(step, (base, delta), *rest, cache=shared, new_tokens=NEW), want)


def test_the_example():
    results = doctest.testmod(prefixes)
    assert results.attempted and not results.failed
