"""The model of a config for generation, with its base and an adapter."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.input.encoding import Encoder
from experiments.models import location
from experiments.models.decoder import Decoder
from experiments.models.options import Options
from experiments.studies.decoder.adapters import read_adapter
from experiments.studies.decoder.encoding import read_encoder, read_end_tokens
from experiments.studies.decoder.program import Program
from experiments.studies.sft.program import abstract


@dataclass(frozen=True)
class Assistant:
    """A model that answers prompts.

    Attributes:
      directory: The checkpoint.
      program: The program, whose mesh holds the weights.
      encoder: The encoder of the checkpoint.
      ends: The tokens that end an answer.
    """

    directory: Path
    program: Program
    encoder: Encoder
    ends: tuple[int, ...]

    @classmethod
    def of(cls, config: Config) -> "Assistant":
        """Returns the assistant of a config, without weights.

        Raises:
          UserError: The model is missing, malformed or incompatible with the mesh.
        """
        directory = location.find(config.model)
        encoder = read_encoder(config, directory)
        return cls(directory, abstract(config), encoder, read_end_tokens(directory))

    @functools.cached_property
    def model(self) -> Decoder:
        """The abstract model for generation. A batch is not sharded; only the weights are."""
        options = Options(scan=self.program.model.options.scan, dtype=jnp.dtype(self.program.config.dtype))
        return nnx.eval_shape(lambda: self.program.family.build(self.program.shape, options, rngs=nnx.Rngs(0)))

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of tokens."""
        return self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)

    def load(self, adapter: Path | None) -> tuple[Any, Any]:
        """Loads the base and an adapter onto the mesh.

        Args:
          adapter: A directory that lora_jax or PEFT wrote; None loads the base only.

        Returns:
          The base and the delta, which is empty without an adapter.

        Raises:
          UserError: The weights are missing or damaged, or the adapter does not fit them.
        """
        program, delta = self.program, {}
        if adapter is not None:
            names, dtype = program.family.names(program.shape), jnp.dtype(program.config.adapter_dtype)
            delta = read_adapter(adapter, program.base, names, dtype, flag="--adapter")
            delta = jax.device_put(delta, lora.delta_shardings(program.base, delta))
        return program.load(self.directory), delta
