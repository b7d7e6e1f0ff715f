"""The step benchmark's variants compute the same thing; how long they take is its own business."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import gpt2_step_model as model
from experiments.benchmarks import step, step_variants

SHAPE = model.Shape(layers=2, width=16, hidden=32, heads=2, vocabulary=40, batch=2, length=6)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# The model adds biases as most code does, and the steps use optax.
pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture(scope="module")
def problem():
    return step_variants.make_problem(SHAPE, rank=3, alpha=5.0)


@functools.lru_cache
def run(problem, make):
    parts = make(problem)
    loss, gradients = jax.jit(jax.value_and_grad(parts.loss))(parts.train, parts.rest, problem.tokens)
    return float(loss), gradients


def rank_major(gradients):
    """Gradients of the factors as {layer: (a, b)}, whatever the variant calls them."""
    factors = {}
    for path, gradient in gradients.items():
        if isinstance(gradient, dict):
            a, b = gradient["kernel_lora_a"].T, gradient["kernel_lora_b"]
        elif isinstance(gradient, tuple):
            a, b = gradient
            a = a if a.shape[0] == b.shape[0] else a.T
        else:
            a, b = gradient.a, gradient.b
        factors[path.removesuffix("/kernel").replace("_", "/")] = (a, b)
    return factors


@pytest.mark.parametrize("name", ["lora_jax", "flattened by hand", "hand-written", "W+AB formed", "qwix"])
def test_variants_agree(name, problem):
    expected_loss, full_gradients = run(problem, step_variants.full)
    loss, gradients = run(problem, step_variants.available()[name])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    gradients = rank_major(gradients)
    assert gradients.keys() == problem.factors.keys()
    for path, (a, b) in problem.factors.items():
        # Through the chain rule from the gradient of the whole weight.
        _, layer, part, kernel = path.split("/")
        whole = full_gradients["layers"][layer][part][kernel]["kernel"]
        np.testing.assert_allclose(gradients[path][0], problem.scale * b @ whole.T, **CLOSE)
        np.testing.assert_allclose(gradients[path][1], problem.scale * a @ whole, **CLOSE)


def test_bound_is_one_adapter_on_the_first_layer(problem):
    loss, gradients = run(problem, step_variants.bound)
    one = functools.partial(step_variants.library, layers=[step_variants.FIRST])
    expected_loss, expected = run(problem, one)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    (expected,) = rank_major(expected).values()
    for ours, theirs in zip(gradients[step_variants.FIRST], expected):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def weight_shaped(problem, make):
    """Arrays of the shape of an adapted weight (or its transpose) that the compiled step holds beside its arguments."""
    parts = make(problem)
    train_step, state = step.make_step(parts)
    text = train_step.lower(parts.train, state, parts.rest, problem.tokens).compile().as_text()
    sizes = {size for n_in, n_out in problem.shape.linears().values() for size in ((n_in, n_out), (n_out, n_in))}
    results, inside = [], False
    for line in text.splitlines():
        if line.endswith("{"):  # what stands inside of a fusion is held by nobody
            inside = "fused" in line.split("(")[0]
        held = re.match(r"\s+(?:ROOT )?%?\S+ = \w+\[(\d+),(\d+)\]\S* (?!parameter)([\w-]+)\(", line)
        if held and not inside and (int(held[1]), int(held[2])) in sizes:
            results.append(held[3])
    return results


def test_doras_step_holds_no_array_of_a_weights_shape():
    shape = model.Shape(layers=1, width=256, hidden=640, heads=2, vocabulary=40, batch=2, length=6)
    problem = step_variants.make_problem(shape, rank=3)
    assert weight_shaped(problem, step_variants.formed) != []
    assert weight_shaped(problem, step_variants.available()["DoRA"]) == []


def test_command_prints_variants_and_verdicts(capsys):
    names = ("lora_jax", "DoRA", "bound", "hand-written", "full fine-tuning")
    shape = dataclasses.replace(SHAPE, layers=1)
    status = step.main(step.Config(shape=shape, rank=2, steps=1, compiles=1, variants=names))
    printed = capsys.readouterr().out
    for name in names:
        assert f"\n{name} " in printed
    assert printed.count("PASS") + printed.count("FAIL") == len(step.TARGETS)
    assert status == int("FAIL" in printed)


def test_unknown_variant_is_one_sentence(capsys):
    assert step.main(step.Config(variants=("lora",))) == 2
    assert capsys.readouterr().err.startswith("unknown variant lora, expected one of lora_jax, bound")


def test_causal(problem):
    """A position's logits depend on no later token."""
    logits = functools.partial(model.logits, problem.base, shape=SHAPE)
    tokens = problem.tokens[:, :-1]
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % SHAPE.vocabulary)
    before, after = logits(tokens), logits(changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not jnp.array_equal(before[:, 4], after[:, 4])
