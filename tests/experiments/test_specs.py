"""Methods that are specs and no code of their own, counted on full-sized models against the LoRA paper's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from experiments.models import bert, gpt2, heads, llama
from experiments.models.options import Options
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
GPT2_MEDIUM = gpt2.Gpt2Config(vocab_size=50257, n_positions=1024, n_embd=1024, n_layer=24, n_head=16)


@functools.cache
def parameters(name):
    """A full-sized model's parameters that take no memory: zeros with no strides."""

    def build():
        if name == "gpt2-medium":
            return gpt2.Gpt2(GPT2_MEDIUM, rngs=nnx.Rngs(0))
        encoder = bert.Bert(ROBERTA, rngs=nnx.Rngs(0))
        return heads.SequenceClassifier(encoder, ROBERTA, 3, rngs=nnx.Rngs(0))

    _, base = lora.nnx.functional(nnx.eval_shape(build))
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), base)


HEAD = r"^(pooler|classifier)/"
LOW_RANK = lora.LoRA(8, alpha=16, axes=("in", "out"))
SPECS = {
    "BitFit": ("roberta-base", {r"^encoder/.*bias$": lora.Full()}, 102_144),
    "norm tuning": ("roberta-base", {r"norm.*(scale|bias)$": lora.Full()}, 2 * 768 * (2 * 12 + 1)),
    "head only": ("roberta-base", {HEAD: lora.Full()}, 592_899),
    "LoRA and the head": (
        "roberta-base",
        {r"(query|value)/kernel": LOW_RANK, HEAD: lora.Full()},
        294_912 + 592_899,
    ),
    "low rank and full rank": (
        "roberta-base",
        {r"layers/(0|11)/.*kernel": lora.Full(), r"^encoder/.*kernel": LOW_RANK},
        2 * 12 * 768**2 + 10 * 8 * (4 * 2 * 768 + 2 * (768 + 3072)),
    ),
    "top 2 layers": ("gpt2-medium", {r"layers/(22|23)/": lora.Full()}, 25_192_448),
}


@pytest.mark.parametrize("model, spec, count", SPECS.values(), ids=SPECS)
def test_a_spec_trains_what_the_method_does(model, spec, count):
    base = parameters(model)
    summary = lora.summary(base, lora.init(jax.random.key(0), base, spec))
    assert summary.trainable == count


def test_full_fine_tuning_is_a_spec():
    shapes = {"small": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}
    delta = lora.init(jax.random.key(0), shapes, {"": lora.Full()})
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
