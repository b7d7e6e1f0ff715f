"""The supported decoders, by the `model_type` of their `config.json`."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError
from experiments.models import gpt2, llama, mixtral
from experiments.models.decoder import Decoder
from experiments.models.options import WeightAxes
from lora_jax.peft import Names


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
      shape: Reads a model's shape from the content of a `config.json`.
      build: Builds a model with random weights: `build(shape, options, rngs=rngs)`.
      load: Loads a model from a directory; see :func:`experiments.models.decoder_loading.load_decoder`.
      names: Returns the names of the weights of a model of a shape in a checkpoint.
      axes: The names of the axes of its weights.
    """

    shape: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., Decoder]
    load: Callable[..., Decoder]
    names: Callable[[Any], Names]
    axes: WeightAxes


GPT2 = Family(gpt2.Gpt2Config.from_json, gpt2.Gpt2, gpt2.load, gpt2.names, gpt2.AXES)
LLAMA = Family(llama.LlamaConfig.from_json, llama.Llama, llama.load, llama.names, llama.AXES)
MIXTRAL = Family(mixtral.MixtralConfig.from_json, mixtral.Mixtral, mixtral.load, mixtral.names, mixtral.AXES)
UNUSED = f"{llama.UNUSED}|{gpt2.UNUSED}"
"""A pattern of tensors in old checkpoints that no family uses."""

FAMILIES = {"gpt2": GPT2, "mixtral": MIXTRAL, **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA)}


def get_family(config: Mapping[str, Any]) -> Family:
    """Returns the family of the model that a `config.json` describes.

    Raises:
      UserError: The family is not supported.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"supported is one of {', '.join(FAMILIES)}"
        raise UserError(f"config.json: model_type is {name!r}; {hint}")
    return FAMILIES[name]
