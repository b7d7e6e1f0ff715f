"""The stored decoders, loaded once in a process, and what transformers computed from them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

import lora_jax as lora
from experiments import generation
from experiments.models import gpt2, llama, mixtral
from experiments.models.options import DEFAULT

FIXTURES = Path(__file__).parent / "fixtures" / "models"
LLAMAS = ("llama", "llama_biases", "mistral", "qwen2", "qwen3")
ALL = ("gpt2", "mixtral", *LLAMAS)


def architecture(name):
    return {"gpt2": gpt2, "mixtral": mixtral}.get(name, llama)


def names(name):
    """The names of the weights, and the content of config.json."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    if name == "mixtral":
        return mixtral.names(mixtral.MixtralConfig.from_json(config)), config
    return gpt2.NAMES if name == "gpt2" else llama.names(llama.LlamaConfig.from_json(config)), config


@functools.cache
def expected(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        return {key: array.astype(np.int32) if array.dtype == np.int64 else array for key, array in file.items()}


@functools.cache
def load(name, options=DEFAULT):
    """The model, its jitted function, its parameters and a step for generation."""
    model = architecture(name).load(FIXTURES / name, options)
    apply, base = lora.nnx.functional(model)
    return Loaded(model, apply, base)


class Loaded:
    def __init__(self, model, apply, base):
        self.model, self.apply, self.base = model, apply, base
        self.jitted = jax.jit(apply, static_argnames="last")
        self.step = generation.make_step(apply)
