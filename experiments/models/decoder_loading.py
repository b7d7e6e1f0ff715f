"""Loads decoders from checkpoints in Hugging Face layout."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import checkpoint
from experiments.models.decoder import Decoder
from lora_jax.peft import Names
from lora_jax.quantization import Format

C = TypeVar("C")
M = TypeVar("M", bound=Decoder)

_EMBEDDING, _HEAD = "token/embedding", "lm_head.weight"


class Loading(TypedDict, total=False):
    """Keyword arguments for loading a decoder.

    Attributes:
      dtype: The dtype of the weights, float32 by default; None keeps the stored dtypes.
      sharding: See :func:`experiments.models.checkpoint.load`.
      rules: The weights to quantize while they are read; see :func:`experiments.models.checkpoint.load`.
      untied: Whether a head that is tied to the embedding becomes a separate weight with the embedding's values.
      stored: Whether codes of a GGUF file are used as they are; see :func:`experiments.models.checkpoint.load`.
    """

    dtype: Any
    sharding: checkpoint.Sharding | None
    rules: Mapping[str, Format | None] | None
    untied: bool
    stored: bool


def load_decoder(
    build: Callable[[C, nnx.Rngs], M],
    read_shape: Callable[[Mapping[str, Any]], C],
    names: Callable[[C], Names],
    directory: Path,
    unused: str,
    *,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
    rules: Mapping[str, Format | None] | None = None,
    untied: bool = False,
    stored: bool = False,
) -> M:
    """Returns a decoder with the weights of a checkpoint in Hugging Face layout.

    Args:
      build: Builds the model from its shape and keys.
      read_shape: Reads the shape from the content of `config.json`.
      names: Returns the names of the weights of a model of a shape.
      directory: A directory with `config.json` and safetensors.
      unused: See :func:`experiments.models.checkpoint.load`.
      dtype: See :class:`Loading`.
      sharding: See :class:`Loading`.
      rules: See :class:`Loading`.
      untied: See :class:`Loading`.
      stored: See :class:`Loading`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    shape = read_shape(checkpoint.read_config(directory, untied=untied))
    table = names(shape)
    embedding = next(weight.name for weight in table.weights if weight.path == _EMBEDDING)
    return checkpoint.load(
        lambda rngs: build(shape, rngs),
        table,
        directory,
        dtype=dtype,
        sharding=sharding,
        unused=unused,
        rules=rules,
        copies={_HEAD: embedding} if untied else None,
        example=(jax.ShapeDtypeStruct((1, 8), jnp.int32),),
        stored=stored,
    )


def tie_names(names: Names) -> Names:
    """Returns the names of a model whose head is tied to its embedding."""
    weights = tuple(
        dataclasses.replace(weight, tied=(_HEAD,)) if weight.path == _EMBEDDING else weight for weight in names.weights
    )
    return dataclasses.replace(names, weights=weights)
