"""The decoders that a checkpoint may hold, by the `model_type` of its `config.json`."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from experiments.errors import UserError
from experiments.models import gpt2, llama, mixtral
from experiments.models.decoder import Decoder
from experiments.models.options import Options, WeightAxes
from lora_jax.peft import Names


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
      shape: A model's shape from a `config.json`.
      build: A model of a shape, with random weights.
      load: A model from a directory: see :func:`experiments.models.llama.load`.
      names: The names of the weights of a model of a shape in a checkpoint.
      axes: What the axes of its weights are.
    """

    shape: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, Options, nnx.Rngs], Decoder]
    load: Callable[..., Decoder]
    names: Callable[[Any], Names]
    axes: WeightAxes


GPT2 = Family(
    gpt2.Gpt2Config.from_json,
    lambda shape, options, rngs: gpt2.Gpt2(shape, options, rngs=rngs),
    gpt2.load,
    gpt2.names,
    gpt2.AXES,
)
LLAMA = Family(
    llama.LlamaConfig.from_json,
    lambda shape, options, rngs: llama.Llama(shape, options, rngs=rngs),
    llama.load,
    llama.names,
    llama.AXES,
)
MIXTRAL = Family(
    mixtral.MixtralConfig.from_json,
    lambda shape, options, rngs: mixtral.Mixtral(shape, options, rngs=rngs),
    mixtral.load,
    mixtral.names,
    mixtral.AXES,
)
UNUSED = f"{llama.UNUSED}|{gpt2.UNUSED}"
"""A pattern of tensors in old checkpoints that no family needs."""

FAMILIES = {"gpt2": GPT2, "mixtral": MIXTRAL, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA)}


def of(config: Mapping[str, Any]) -> Family:
    """The family of the model that a `config.json` describes.

    Raises:
      UserError: There is none; the message says which there are.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"supported are {', '.join(FAMILIES)}"
        raise UserError(f"config.json: model_type is {name!r}; {hint}")
    return FAMILIES[name]
