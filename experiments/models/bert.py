"""The encoders of BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT and ELECTRA in Flax NNX.

Token ids in, one vector a token out.

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

from experiments.models import checkpoint, stack
from experiments.models import config as config_json
from experiments.models.blocks import Attention, encoder_layers
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from lora_jax.peft import LINEAR, Names, Weight

_ROBERTA = ("roberta", "xlm-roberta", "camembert")  # one architecture, and one prefix in checkpoints

# What transformers takes for a field that a config.json leaves out, where it is not what BERT's would mean.
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
"""DistilBERT's names of fields, and BERT's."""


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder of BERT's form; names are those of Hugging Face's `config.json`.

    Attributes:
      type_vocab_size: 0 does without segment vectors.
      embedding_size: Width of the embeddings, which a linear layer brings to `hidden_size`; 0 is `hidden_size`.
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
        """The shape that a `config.json` describes.

        Raises:
          UserError: It lacks a field or describes something that this encoder does not compute.
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
        """How many tokens there are positions for."""
        return self.max_position_embeddings - self.first_position

    @property
    def counts_padding(self) -> bool:
        """Whether positions number all tokens from 0, as BERT's do; RoBERTa's skip padding."""
        return self.model_type not in _ROBERTA

    @property
    def first_position(self) -> int:
        """The position of a text's first token: RoBERTa keeps a row for padding and leaves those before it unused."""
        return 0 if self.counts_padding else self.pad_token_id + 1

    @property
    def embedded(self) -> int:
        """The width of the embeddings."""
        return self.embedding_size or self.hidden_size

    @property
    def names(self) -> Names:
        """The names of the weights in a checkpoint of this model."""
        if self.model_type == "distilbert":
            return DISTILBERT_NAMES
        prefix = "roberta" if self.model_type in _ROBERTA else self.model_type
        return _names(f"{prefix}.", segments=self.type_vocab_size > 0, projected=self.embedded != self.hidden_size)


class Embeddings(nnx.Module):
    """Word, position and segment vectors, summed and normalized."""

    def __init__(self, config: BertConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.embedded, options.dtype
        self.word = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        segments = config.type_vocab_size
        self.token_type = nnx.Embed(segments, width, dtype=dtype, rngs=rngs) if segments else None
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, types_BL: jax.Array) -> jax.Array:
        x_BLD = self.word(tokens_BL)
        if self.token_type is not None:
            x_BLD = x_BLD + self.token_type(types_BL)
        x_BLD = x_BLD + self.position(self.numbers(tokens_BL))
        return self.dropout(self.norm(x_BLD))

    def numbers(self, tokens_BL: jax.Array) -> jax.Array:
        """The position of each token, `[batch or 1, length]`."""
        if self.config.counts_padding:
            return jnp.arange(tokens_BL.shape[1])[None]
        is_text_BL = (tokens_BL != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(is_text_BL, axis=1) * is_text_BL + self.config.pad_token_id


class Encoder(nnx.Module):
    """The layers, one after another."""

    def __init__(self, config: BertConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.options = options

        def attention(rngs: nnx.Rngs) -> Attention:
            return Attention(config.hidden_size, config.num_attention_heads, options, dropout=dropout, rngs=rngs)

        self.layers = encoder_layers(config, attention, options, norm_first=False, dropout=dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        return stack.run(self.layers, x_BLD, mask_BL, options=self.options)[0]


class Bert(nnx.Module):
    """Embeddings and encoder.

    Args:
      config: The shape.
      options: How it computes.
      dropout: Rate on embeddings, attention weights and both branches of a layer, while training. Attention
        weights that are dropped are computed one by one, whatever kernel `options` names.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(self, config: BertConfig, options: Options = DEFAULT, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, options, dropout=dropout, rngs=rngs)
        sizes = (config.embedded, config.hidden_size)
        self.projection = nnx.Linear(*sizes, dtype=options.dtype, rngs=rngs) if sizes[0] != sizes[1] else None
        self.encoder = Encoder(config, options, dropout=dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, types_BL: jax.Array | None = None) -> jax.Array:
        """The last hidden states.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          mask_BL: True (or 1) at tokens, False at padding. RoBERTa numbers the positions of a text by the tokens
            that are not its padding token, so padding has to be that token there.
          types_BL: Segment ids; None means all in segment 0.

        Returns:
          `float[batch, length, width]`; rows at padding mean nothing.

        Raises:
          ValueError: There are more tokens than positions.
        """
        if tokens_BL.shape[1] > self.config.positions:
            raise ValueError(f"{tokens_BL.shape[1]} tokens, {self.config.positions} positions")
        types_BL = jnp.zeros_like(tokens_BL) if types_BL is None else types_BL
        x_BLD = self.embeddings(tokens_BL, types_BL)
        if self.projection is not None:
            x_BLD = self.projection(x_BLD)
        return self.encoder(x_BLD, mask_BL.astype(bool))


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
) -> Bert:
    """The encoder of a checkpoint in Hugging Face layout; see :func:`checkpoint.load`.

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
"""What the axes of a weight are, for :func:`experiments.training.mesh.weight_shardings`."""

_PART = "{part=query|key|value}"
_LAYER = "encoder/layers/{layer}"


def _embeddings(prefix: str, tables: str) -> tuple[Weight, ...]:
    path, name = f"embeddings/{{table={tables}}}/embedding", prefix + "embeddings.{table}_embeddings.weight"
    return (
        Weight(path, name, module="embedding"),
        Weight("embeddings/norm/scale", f"{prefix}embeddings.LayerNorm.weight"),
        Weight("embeddings/norm/bias", f"{prefix}embeddings.LayerNorm.bias"),
    )


def _names(prefix: str, *, segments: bool = True, projected: bool = False) -> Names:
    layer = prefix + "encoder.layer.{layer}"
    projection = (
        Weight("projection/kernel", f"{prefix}embeddings_project.weight", LINEAR),
        Weight("projection/bias", f"{prefix}embeddings_project.bias"),
    )
    return Names(
        (
            *_embeddings(prefix, "word|position|token_type" if segments else "word|position"),
            *(projection if projected else ()),
            Weight(f"{_LAYER}/attention/output/kernel", f"{layer}.attention.output.dense.weight", LINEAR),
            Weight(f"{_LAYER}/attention/output/bias", f"{layer}.attention.output.dense.bias"),
            Weight(f"{_LAYER}/attention/{_PART}/kernel", layer + ".attention.self.{part}.weight", LINEAR),
            Weight(f"{_LAYER}/attention/{_PART}/bias", layer + ".attention.self.{part}.bias"),
            Weight(f"{_LAYER}/attention_norm/scale", f"{layer}.attention.output.LayerNorm.weight"),
            Weight(f"{_LAYER}/attention_norm/bias", f"{layer}.attention.output.LayerNorm.bias"),
            Weight(f"{_LAYER}/feed_forward/up/kernel", f"{layer}.intermediate.dense.weight", LINEAR),
            Weight(f"{_LAYER}/feed_forward/up/bias", f"{layer}.intermediate.dense.bias"),
            Weight(f"{_LAYER}/feed_forward/down/kernel", f"{layer}.output.dense.weight", LINEAR),
            Weight(f"{_LAYER}/feed_forward/down/bias", f"{layer}.output.dense.bias"),
            Weight(f"{_LAYER}/feed_forward_norm/scale", f"{layer}.output.LayerNorm.weight"),
            Weight(f"{_LAYER}/feed_forward_norm/bias", f"{layer}.output.LayerNorm.bias"),
        ),
        prefix=prefix,
    )


def _distilbert_names() -> Names:
    prefix = "distilbert."
    layer = prefix + "transformer.layer.{layer}"
    linear = {
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/output": "attention.out_lin",
        "feed_forward/up": "ffn.lin1",
        "feed_forward/down": "ffn.lin2",
    }
    norms = {"attention_norm": "sa_layer_norm", "feed_forward_norm": "output_layer_norm"}
    rows = [*_embeddings(prefix, "word|position")]
    for ours, name in linear.items():
        rows.append(Weight(f"{_LAYER}/{ours}/kernel", f"{layer}.{name}.weight", LINEAR))
        rows.append(Weight(f"{_LAYER}/{ours}/bias", f"{layer}.{name}.bias"))
    for ours, name in norms.items():
        rows.append(Weight(f"{_LAYER}/{ours}/scale", f"{layer}.{name}.weight"))
        rows.append(Weight(f"{_LAYER}/{ours}/bias", f"{layer}.{name}.bias"))
    return Names(tuple(rows), prefix=prefix)


NAMES = _names("bert.")
ROBERTA_NAMES = _names("roberta.")
DISTILBERT_NAMES = _distilbert_names()
# the first checkpoints call a norm's scale and bias gamma and beta
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
UNUSED = (
    r"position_ids$|^pooler\.|^cls\.|^lm_head\.|^(pre_)?classifier\.|^qa_outputs\."
    r"|^vocab_(transform|layer_norm|projector)\.|^(discriminator|generator)_predictions\.|^generator_lm_head\."
)
