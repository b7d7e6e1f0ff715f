"""BERT's encoder in Flax NNX: token ids in, one vector a token out.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width.

References:
  Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2018
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import UserError
from lora_jax.peft import LINEAR, Names, Weight


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT encoder; names are those of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "BertConfig":
        """The shape that a `config.json` describes.

        Raises:
          UserError: It lacks a field or describes something that this encoder does not compute.
        """
        fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, value in fixed.items():
            if config.get(name, value) != value:
                raise UserError(f"config.json: {name} is {config[name]!r}, this encoder computes {value!r} only")
        try:
            shape = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        except TypeError as error:
            raise UserError(f"config.json: {str(error).removeprefix('BertConfig.__init__() ')}") from None
        if shape.hidden_size % shape.num_attention_heads:
            raise UserError(
                f"config.json: hidden_size {shape.hidden_size} is no multiple of "
                f"num_attention_heads {shape.num_attention_heads}"
            )
        return shape


class Embeddings(nnx.Module):
    """Word, position and segment vectors, summed and normalised."""

    def __init__(self, config: BertConfig, *, dropout: float, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, types_BL: jax.Array) -> jax.Array:
        position_1LD = self.position(jnp.arange(tokens_BL.shape[1]))[None]
        x_BLD = self.word(tokens_BL) + self.token_type(types_BL) + position_1LD
        return self.dropout(self.norm(x_BLD))


class Attention(nnx.Module):
    """Multi-head self-attention; query, key, value and output are a kernel each."""

    def __init__(self, config: BertConfig, *, dropout: float, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.output = nnx.Linear(width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        q_BLHK, k_BLHK, v_BLHK = (self.split(f(x_BLD)) for f in (self.query, self.key, self.value))
        scores_BHLL = jnp.einsum("bqhk,bthk->bhqt", q_BLHK, k_BLHK) * (q_BLHK.shape[-1] ** -0.5)
        scores_BHLL = jnp.where(mask_BL[:, None, None, :], scores_BHLL, jnp.finfo(scores_BHLL.dtype).min)
        weights_BHLL = self.dropout(jax.nn.softmax(scores_BHLL, axis=-1))
        mixed_BLHK = jnp.einsum("bhqt,bthk->bqhk", weights_BHLL, v_BLHK)
        return self.output(mixed_BLHK.reshape(x_BLD.shape))

    def split(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD.reshape(*x_BLD.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """Two linear layers with a (true, not tanh-approximated) GELU between them."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.down = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.gelu(self.up(x_BLD), approximate=False)
        return self.down(h_BLF)


class Layer(nnx.Module):
    """Attention, then feed-forward; each adds to its input and the sum is normalised."""

    def __init__(self, config: BertConfig, *, dropout: float, rngs: nnx.Rngs):
        self.attention = Attention(config, dropout=dropout, rngs=rngs)
        self.attention_norm = _norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.feed_forward_norm = _norm(config, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        x_BLD = self.attention_norm(x_BLD + self.dropout(self.attention(x_BLD, mask_BL)))
        return self.feed_forward_norm(x_BLD + self.dropout(self.feed_forward(x_BLD)))


class Encoder(nnx.Module):
    """The layers, one after another."""

    def __init__(self, config: BertConfig, *, dropout: float, rngs: nnx.Rngs):
        self.layers = nnx.List(Layer(config, dropout=dropout, rngs=rngs) for _ in range(config.num_hidden_layers))

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask_BL)
        return x_BLD


class Bert(nnx.Module):
    """Embeddings and encoder.

    Args:
      config: The shape.
      dropout: Rate on embeddings, attention weights and both branches of a layer, while training.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(self, config: BertConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, dropout=dropout, rngs=rngs)
        self.encoder = Encoder(config, dropout=dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, types_BL: jax.Array | None = None) -> jax.Array:
        """The last hidden states.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          mask_BL: True (or 1) at tokens, False at padding.
          types_BL: Segment ids; None means all in segment 0.

        Returns:
          `float[batch, length, width]`; rows at padding mean nothing.

        Raises:
          ValueError: There are more tokens than positions.
        """
        if tokens_BL.shape[1] > self.embeddings.position.num_embeddings:
            raise ValueError(f"{tokens_BL.shape[1]} tokens, {self.embeddings.position.num_embeddings} positions")
        types_BL = jnp.zeros_like(tokens_BL) if types_BL is None else types_BL
        x_BLD = self.embeddings(tokens_BL, types_BL)
        return self.encoder(x_BLD, mask_BL.astype(bool))


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x²] - E[x]², cancels: its error alone exceeds the difference between frameworks.
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs)


_TABLE = "{table=word|position|token_type}"
_PART = "{part=query|key|value}"
_LAYER, _HF_LAYER = "encoder/layers/{layer}", "bert.encoder.layer.{layer}"
NAMES = Names(
    (
        Weight(
            f"embeddings/{_TABLE}/embedding",
            "bert.embeddings.{table}_embeddings.weight",
            module="embedding",
        ),
        Weight("embeddings/norm/scale", "bert.embeddings.LayerNorm.weight"),
        Weight("embeddings/norm/bias", "bert.embeddings.LayerNorm.bias"),
        Weight(f"{_LAYER}/attention/output/kernel", f"{_HF_LAYER}.attention.output.dense.weight", LINEAR),
        Weight(f"{_LAYER}/attention/output/bias", f"{_HF_LAYER}.attention.output.dense.bias"),
        Weight(f"{_LAYER}/attention/{_PART}/kernel", _HF_LAYER + ".attention.self.{part}.weight", LINEAR),
        Weight(f"{_LAYER}/attention/{_PART}/bias", _HF_LAYER + ".attention.self.{part}.bias"),
        Weight(f"{_LAYER}/attention_norm/scale", f"{_HF_LAYER}.attention.output.LayerNorm.weight"),
        Weight(f"{_LAYER}/attention_norm/bias", f"{_HF_LAYER}.attention.output.LayerNorm.bias"),
        Weight(f"{_LAYER}/feed_forward/up/kernel", f"{_HF_LAYER}.intermediate.dense.weight", LINEAR),
        Weight(f"{_LAYER}/feed_forward/up/bias", f"{_HF_LAYER}.intermediate.dense.bias"),
        Weight(f"{_LAYER}/feed_forward/down/kernel", f"{_HF_LAYER}.output.dense.weight", LINEAR),
        Weight(f"{_LAYER}/feed_forward/down/bias", f"{_HF_LAYER}.output.dense.bias"),
        Weight(f"{_LAYER}/feed_forward_norm/scale", f"{_HF_LAYER}.output.LayerNorm.weight"),
        Weight(f"{_LAYER}/feed_forward_norm/bias", f"{_HF_LAYER}.output.LayerNorm.bias"),
    ),
    prefix="bert.",
)
# the first checkpoints call a norm's scale and bias gamma and beta
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
UNUSED = r"position_ids$|^pooler\.|^cls\.|^classifier\.|^qa_outputs\."
