"""The encoders of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and ELECTRA in Flax NNX.

They map token ids to a vector per token.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width.

References:
  Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018
  Liu et al., `RoBERTa <https://arxiv.org/abs/1907.11692>`_, 2019
  Conneau et al., `XLM-RoBERTa <https://arxiv.org/abs/1911.02116>`_, 2019
  Sanh et al., `DistilBERT <https://arxiv.org/abs/1910.01108>`_, 2019
  Clark et al., `ELECTRA <https://arxiv.org/abs/2003.10555>`_, 2020
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import checkpoint
from experiments.models import config as config_json
from experiments.models.bert_names import DISTILBERT_NAMES, SPELLINGS, UNUSED, encoder_names
from experiments.models.blocks import Attention, encoder_layers
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from experiments.models.text_encoder import TextEncoder
from experiments.models.virtual import NO_VIRTUAL, Virtual
from lora_jax.peft import Names

_ROBERTA = ("roberta", "xlm-roberta", "camembert")  # the same architecture, and the same prefix in checkpoints

# The values that transformers uses for fields that a config.json omits, if they differ from BERT's.
_ABSENT: dict[str, dict[str, Any]] = {
    **{family: {"pad_token_id": 1} for family in _ROBERTA},
    "electra": {"embedding_size": 128},
    "distilbert": {"type_vocab_size": 0},
}

_DISTILBERT = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}
"""BERT's names of DistilBERT's fields."""


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder of BERT's form; fields have the names of Hugging Face's `config.json`.

    Attributes:
      type_vocab_size: The number of segments; 0 has no segment embeddings.
      embedding_size: Width of the embeddings, which a linear layer projects to `hidden_size`; 0 is `hidden_size`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    embedding_size: int = 0
    model_type: str = "bert"

    @classmethod
    @config_json.parsing
    def from_json(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this encoder does not support.
        """
        family = config.get("model_type", "bert")
        supported = {
            "model_type": ("bert", *_ROBERTA, "distilbert", "electra"),
            "hidden_act": ("gelu",),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
        }
        renamed = _DISTILBERT if family == "distilbert" else {}
        fields = {renamed.get(name, name): value for name, value in config.items()}
        shape = config_json.read(cls, {**_ABSENT.get(str(family), {}), **fields}, supported)
        config_json.check_heads(shape)
        return shape

    @property
    def positions(self) -> int:
        """The maximum number of tokens."""
        return self.max_position_embeddings - self.first_position

    @property
    def counts_padding(self) -> bool:
        """Whether positions count padding, from 0, as in BERT; RoBERTa's positions skip padding."""
        return self.model_type not in _ROBERTA

    @property
    def first_position(self) -> int:
        """The position of a text's first token; RoBERTa reserves a row for padding and skips the rows before it."""
        return 0 if self.counts_padding else self.pad_token_id + 1

    @property
    def embedding_width(self) -> int:
        """The width of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def names(self) -> Names:
        """The names of the weights in a checkpoint of this model."""
        if self.model_type == "distilbert":
            return DISTILBERT_NAMES
        prefix = "roberta" if self.model_type in _ROBERTA else self.model_type
        return encoder_names(
            f"{prefix}.", segments=self.type_vocab_size > 0, projected=self.embedding_width != self.hidden_size
        )


class Embeddings(nnx.Module):
    """The normalized sum of word, position and segment embeddings."""

    def __init__(self, config: BertConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.embedding_width, options.dtype
        self.word = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        segments = config.type_vocab_size
        self.token_type = nnx.Embed(segments, width, dtype=dtype, rngs=rngs) if segments else None
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, types_BL: jax.Array, virtual: Virtual) -> jax.Array:
        x_BLD = virtual.begin(self.word(tokens_BL))
        if self.token_type is not None:
            x_BLD = x_BLD + self.token_type(virtual.pad(types_BL, 0))
        x_BLD = x_BLD + self.position(self.positions(tokens_BL, virtual))
        return self.dropout(self.norm(x_BLD))

    def positions(self, tokens_BL: jax.Array, virtual: Virtual = NO_VIRTUAL) -> jax.Array:
        """Returns the position of each token, `[batch or 1, length]`, including virtual ones."""
        if self.config.counts_padding:
            return jnp.arange(virtual.in_sequence + tokens_BL.shape[1])[None]
        is_text_BL = virtual.pad(tokens_BL != self.config.pad_token_id, True).astype(jnp.int32)
        return jnp.cumsum(is_text_BL, axis=1) * is_text_BL + self.config.pad_token_id


class Encoder(nnx.Module):
    """The sequence of layers."""

    def __init__(self, config: BertConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.options = options

        def attention(rngs: nnx.Rngs) -> Attention:
            return Attention(config.hidden_size, config.num_attention_heads, options, dropout=dropout, rngs=rngs)

        self.layers = encoder_layers(config, attention, options, norm_first=False, dropout=dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array, virtual: Virtual) -> jax.Array:
        return virtual.run(self.layers, x_BLD, mask_BL, options=self.options)


class Bert(TextEncoder):
    """Embeddings and encoder.

    Args:
      config: The shape.
      options: How the model computes.
      dropout: Rate on embeddings, attention weights and both blocks of a layer while training. Dropped attention
        weights are computed by the 'xla' kernel, whatever the options say.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(self, config: BertConfig, options: Options = DEFAULT, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, options, dropout=dropout, rngs=rngs)
        sizes = (config.embedding_width, config.hidden_size)
        self.projection = nnx.Linear(*sizes, dtype=options.dtype, rngs=rngs) if sizes[0] != sizes[1] else None
        self.encoder = Encoder(config, options, dropout=dropout, rngs=rngs)

    def embed(self, tokens_BL: jax.Array, types_BL: jax.Array, virtual: Virtual) -> jax.Array:
        """Returns the input of the first layer, `float[batch, length, width]`."""
        x_BLD = super().embed(tokens_BL, types_BL, virtual)
        return x_BLD if self.projection is None else self.projection(x_BLD)


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
) -> Bert:
    """Returns the encoder of a checkpoint in Hugging Face layout; see :func:`checkpoint.load`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    config = BertConfig.from_json(checkpoint.read_config(directory))
    return checkpoint.load(
        lambda rngs: Bert(config, options, dropout=dropout, rngs=rngs),
        config.names,
        directory,
        dtype=dtype,
        sharding=sharding,
        spellings=SPELLINGS,
        unused=UNUSED,
    )


AXES = (
    (r"embeddings/word/embedding$", ("vocab", "embed")),
    (r"attention/(query|key|value)/kernel$", ("embed", "heads")),
    (r"attention/(query|key|value)/bias$", ("heads",)),
    (r"attention/output/kernel$", ("heads", "embed")),
    (r"feed_forward/up/kernel$", ("embed", "hidden")),
    (r"feed_forward/up/bias$", ("hidden",)),
    (r"feed_forward/down/kernel$", ("hidden", "embed")),
)
"""Names of the axes of weights, for :func:`experiments.training.mesh.weight_shardings`."""
