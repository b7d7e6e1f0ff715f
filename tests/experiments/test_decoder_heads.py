"""Classifiers on decoders: parity with transformers, round trips, and new heads on language models."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from experiments.models import checkpoint, decoder_heads
from experiments.models.options import DEFAULT, Options
from tests.experiments.encoders import MODELS


@pytest.mark.parametrize("name", ["llama_classifier", "gpt2_classifier"])
@pytest.mark.parametrize("options", [DEFAULT, Options(scan=True)], ids=["unrolled", "scanned"])
def test_logits_are_those_of_transformers(name, options, tmp_path):
    apply_fn, base = lora.nnx.functional(decoder_heads.load(MODELS / name, options))
    with np.load(MODELS / name / "expected.npz") as expected:
        for side in ("left", "right"):
            logits = jax.jit(apply_fn)(base, expected[f"tokens_{side}"], expected[f"mask_{side}"])
            np.testing.assert_allclose(logits, expected[f"logits_{side}"], atol=1e-5)
    config = checkpoint.read_config(MODELS / name)
    checkpoint.save(tmp_path / name, base, decoder_heads.names(config), config)
    stored, written = (load_file(at / name / "model.safetensors") for at in (MODELS, tmp_path))
    assert stored.keys() == written.keys()
    for tensor, values in stored.items():
        np.testing.assert_array_equal(values, written[tensor])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_new_head_on_a_language_model(name):
    model = decoder_heads.load(MODELS / name, classes=5)
    apply_fn, base = lora.nnx.functional(model)
    tokens = np.ones((2, 4), np.int32)
    spec = {"attention/.*kernel": lora.LoRA(2), "^score/": lora.LoRA(1)}
    delta = lora.init(jax.random.key(0), base, spec, apply_fn, tokens, tokens)
    assert jax.jit(lora.adapt(apply_fn))(base, delta, tokens, tokens).shape == (2, 5)
    assert lora.explain(apply_fn, base, delta, tokens, tokens).factored
