"""Mixtral in Flax NNX: a model of the Llama family whose feed-forward layers are sparse mixtures of experts.

Attention, positions, the cache and how the model is called are those of :mod:`experiments.models.llama`.

References:
  Jiang et al., `Mixtral of Experts <https://arxiv.org/abs/2401.04088>`_, 2024
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from flax import nnx

from experiments.errors import UserError
from experiments.models import llama
from experiments.models.config import parsing
from experiments.models.decoder_loading import Loading, load_decoder
from experiments.models.experts import SparseFeedForward
from experiments.models.options import DEFAULT, Options
from lora_jax.peft import LINEAR, Fused, Names, Weight

# What transformers takes for a field that a config.json leaves out, where that is not what it takes for Mistral's.
_ABSENT = {"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


@dataclass(frozen=True)
class MixtralConfig(llama.LlamaConfig):
    """The shape of a Mixtral; fields have the names of Hugging Face's `config.json`."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    @classmethod
    @parsing
    def from_json(cls, config: Mapping[str, Any]) -> "MixtralConfig":
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this model does not support.
        """
        for name, value in {"model_type": "mixtral", "router_jitter_noise": 0}.items():
            if config.get(name) not in (None, value):
                raise UserError(f"config.json: {name} is {config[name]!r}, supported is {value!r}")
        shape = super().from_json(_ABSENT | dict(config) | {"model_type": "mistral"})
        assert isinstance(shape, MixtralConfig)
        if not 1 <= shape.num_experts_per_tok <= shape.num_local_experts:
            raise UserError(
                f"config.json: num_experts_per_tok is {shape.num_experts_per_tok}, expected 1 to "
                f"num_local_experts {shape.num_local_experts}"
            )
        return shape


class Layer(llama.Layer):
    """Attention, then a mixture of experts; each adds to its input, which is normalized first."""

    def __init__(self, config: MixtralConfig, options: Options, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.attention_norm = llama.RMSNorm(width, config, rngs=rngs)
        self.attention = llama.Attention(config, options, rngs=rngs)
        self.feed_forward_norm = llama.RMSNorm(width, config, rngs=rngs)
        hidden, experts, chosen = config.intermediate_size, config.num_local_experts, config.num_experts_per_tok
        sparse = SparseFeedForward(width, hidden, experts, chosen, options, rngs=rngs)
        self.feed_forward = sparse  # pyrefly: ignore[bad-assignment]


class Mixtral(llama.Llama):
    """Embedding, layers and a head, which may be tied to the embedding.

    Args:
      config: The shape.
      options: How the model computes.
      rngs: Keys of the random initial weights.
    """

    LAYER = Layer


AXES = (
    (r"feed_forward/router/kernel$", ("embed", None)),
    (r"feed_forward/(gate|up)/kernel$", ("experts", "embed", "hidden")),
    (r"feed_forward/down/kernel$", ("experts", "hidden", "embed")),
    *((pattern, names) for pattern, names in llama.AXES if "feed_forward" not in pattern),
)
"""Names of the axes of weights, for :func:`experiments.training.mesh.weight_shardings`."""

_FEED_FORWARD, _HF_MIXTURE = "layers/{layer}/feed_forward", "model.layers.{layer}.block_sparse_moe"
_EXPERTS = "expert in out -> out in"
_SPARSE = (
    Weight(
        f"{_FEED_FORWARD}/router/kernel",
        f"{_HF_MIXTURE}.gate.weight",
        LINEAR,
        in_model="model.layers.{layer}.mlp.gate.weight",
    ),
    Weight(f"{_FEED_FORWARD}/gate/kernel", _HF_MIXTURE + ".experts.{expert}.w1.weight", _EXPERTS),
    Weight(f"{_FEED_FORWARD}/down/kernel", _HF_MIXTURE + ".experts.{expert}.w2.weight", _EXPERTS),
    Weight(f"{_FEED_FORWARD}/up/kernel", _HF_MIXTURE + ".experts.{expert}.w3.weight", _EXPERTS),
)
_HF_EXPERTS = "model.layers.{layer}.mlp.experts"
_FUSED = (
    Fused(
        f"{_HF_EXPERTS}.gate_up_proj",
        (_HF_MIXTURE + ".experts.{expert}.w1.weight", _HF_MIXTURE + ".experts.{expert}.w3.weight"),
    ),
    Fused(f"{_HF_EXPERTS}.down_proj", (_HF_MIXTURE + ".experts.{expert}.w2.weight",)),
)


def names(config: MixtralConfig) -> Names:
    """Returns the names of a model's weights in checkpoints, which hold a matrix per expert, and in adapters."""
    dense = llama.names(config)
    shared = (row for row in dense.weights if "/feed_forward/" not in row.path)
    return dataclasses.replace(dense, weights=(*shared, *_SPARSE), fused=_FUSED)


def load(directory: Path, options: Options = DEFAULT, **loading: Unpack[Loading]) -> Mixtral:
    """Returns a Mixtral with the weights of a checkpoint; see :func:`load_decoder`."""
    return load_decoder(
        lambda config, rngs: Mixtral(config, options, rngs=rngs),
        MixtralConfig.from_json,
        names,
        directory,
        llama.UNUSED,
        **loading,
    )
