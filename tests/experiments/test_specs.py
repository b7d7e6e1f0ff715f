"""Methods that are specs and no code of their own, counted on full-sized models against the LoRA paper's numbers."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from experiments.baselines import specs
from experiments.errors import UserError
from experiments.models import bert, gpt2, heads, llama
from experiments.models.options import Options
from tests.experiments import decoders, encoders
from tests.experiments.decoders import FIXTURES

ROBERTA = bert.BertConfig(
    vocab_size=50265,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=514,
    type_vocab_size=1,
    model_type="roberta",
    pad_token_id=1,
)


@functools.cache
def parameters():
    """A full-sized model's parameters that take no memory: zeros with no strides."""

    def build():
        encoder = bert.Bert(ROBERTA, rngs=nnx.Rngs(0))
        return heads.SequenceClassifier(encoder, ROBERTA, 3, rngs=nnx.Rngs(0))

    _, base = lora.nnx.functional(nnx.eval_shape(build))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), base)


HEAD = r"^(pooler|classifier)/"
LOW_RANK = lora.LoRA(8, alpha=16, axes=("in", "out"))
SPECS = {
    "norm tuning": ({r"norm.*(scale|bias)$": lora.Full()}, 2 * 768 * (2 * 12 + 1)),
    "LoRA and the head": (
        {r"(query|value)/kernel": LOW_RANK, HEAD: lora.Full()},
        294_912 + 592_899,
    ),
    "low rank and full rank": (
        {r"layers/(0|11)/.*kernel": lora.Full(), r"^encoder/.*kernel": LOW_RANK},
        2 * 12 * 768**2 + 10 * 8 * (4 * 2 * 768 + 2 * (768 + 3072)),
    ),
}


@pytest.mark.parametrize("spec, count", SPECS.values(), ids=SPECS)
def test_a_spec_trains_what_the_method_does(spec, count):
    base = parameters()
    summary = lora.summary(base, lora.init(jax.random.key(0), base, spec))
    assert summary.trainable == count


def test_full_fine_tuning_is_a_spec():
    shapes = {"small": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}
    delta = lora.init(jax.random.key(0), shapes, specs.full())
    assert lora.summary(shapes, delta).trainable == 15


@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_all_linear_is_every_kernel_of_the_layers(family, scan):
    model = family.load(FIXTURES / family.__name__.rpartition(".")[2], Options(scan=scan))
    apply_fn, base = lora.nnx.functional(model)
    delta = lora.init(jax.random.key(0), base, lora.all_linear(lora.LoRA(2)), apply_fn, jnp.ones((1, 4), jnp.int32))
    # PEFT's "all-linear": neither embeddings nor the head, which shares the embedding in GPT-2.
    kernels = {path for path in lora.nnx.paths.flatten(base).paths if path.endswith("kernel")}
    assert set(delta) == {path for path in kernels if path.startswith("layers/")} and delta


ENCODERS = ("bert", "roberta", "deberta_v3", "distilbert")


@functools.cache
def base_of(name, scan=False):
    if name in ENCODERS:
        return lora.nnx.functional(encoders.load(name, Options(scan=scan)))[1]
    return decoders.load(name, Options(scan=scan)).base


def trained(base, spec):
    return set(lora.init(jax.random.key(0), base, spec))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", [*ENCODERS, "gpt2", "llama_biases"])
def test_bitfit_is_every_bias(name, scan):
    base = base_of(name, scan)
    biases = {path for path in lora.paths.flatten(base).paths if path.endswith("/bias")}
    assert trained(base, specs.bitfit(base)) == biases and biases


@pytest.mark.parametrize(
    ("name", "top"), [*((name, ("pooler", "classifier")) for name in ENCODERS), ("llama", ("output",))]
)
def test_heads_are_what_follows_the_last_hidden_state(name, top):
    base = base_of(name)
    assert {path.split("/")[0] for path in trained(base, specs.head(base))} == set(top)
    both = specs.head(base) | specs.top_layers(base, 1)
    assert {path.partition("layers/")[2][:1] for path in trained(base, both)} == {"", "1"}


def test_the_top_layers_have_the_highest_numbers():
    base = {"decoder": {"layers": {number: {"kernel": np.ones(2), "bias": np.ones(2)} for number in range(12)}}}
    assert trained(base, specs.top_layers(base, 3)) == {
        f"decoder/layers/{number}/{leaf}" for number in (9, 10, 11) for leaf in ("kernel", "bias")
    }


@pytest.mark.parametrize(
    ("spec", "name", "scan", "message"),
    [
        (specs.bitfit, "llama", False, "this model has none"),
        (specs.head, "gpt2", False, "tied to the embedding of tokens; load the model with untied=True"),
        (specs.top_layers, "gpt2", True, r"layers are stacked, .*Options\(scan=False\)"),
        (lambda base: specs.top_layers(base, 3), "gpt2", False, r"top_layers\(count=3\): the model has 2 layers"),
    ],
)
def test_specs_that_do_not_fit_a_model(spec, name, scan, message):
    with pytest.raises(UserError, match=message):
        spec(base_of(name, scan))


def test_the_examples():
    results = doctest.testmod(specs)
    assert results.attempted and not results.failed
