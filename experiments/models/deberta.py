"""DeBERTa-v2's and v3's encoder in Flax NNX: attention to contents and, apart from them, to relative positions.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width, R relative
positions.

References:
  He et al., `DeBERTa <https://arxiv.org/abs/2006.03654>`_, 2020
  He et al., `DeBERTaV3 <https://arxiv.org/abs/2111.09543>`_, 2021
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.errors import UserError
from experiments.models import checkpoint
from experiments.models import config as config_json
from experiments.models.bert_names import LINEARS, NORMS, embedding_weights, layer_weights
from experiments.models.blocks import Attention, encoder_layers, products, split_heads
from experiments.models.deberta_convolution import ACTIVATIONS, Convolution
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from experiments.models.text_encoder import TextEncoder
from experiments.models.virtual import Virtual
from lora_jax.peft import CONV1D, Names, Weight


@dataclass(frozen=True)
class DebertaConfig:
    """The shape of a DeBERTa-v2 encoder; fields have the names of Hugging Face's `config.json`.

    Attributes:
      type_vocab_size: The number of segments; 0 has no segment embeddings.
      position_biased_input: Whether absolute positions are added to the word embeddings.
      share_att_key: Whether the kernels of query and key project positions too, without separate kernels.
      pos_att_type: 'c2p' adds attention of contents to positions, 'p2c' attention of positions to contents.
      position_buckets: The number of buckets of relative positions of each sign, coarser with distance; 0 has none.
      max_relative_positions: The maximum distance.
      norm_rel_ebd: 'layer_norm' normalizes the embeddings of relative positions, 'none' does not.
      conv_kernel_size: The number of tokens under the convolution beside the first layer; 0 has none.
      conv_act: The activation of the convolution.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    position_biased_input: bool = True
    share_att_key: bool = False
    pos_att_type: tuple[str, ...] = ()
    position_buckets: int = 0
    max_relative_positions: int = 0
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    model_type: str = "deberta-v2"

    @classmethod
    @config_json.parsing
    def from_json(cls, config: Mapping[str, Any]) -> "DebertaConfig":
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this encoder does not support.
        """
        width, heads = config.get("hidden_size"), config.get("num_attention_heads") or 1
        supported = {
            "model_type": ("deberta-v2",),
            "hidden_act": ("gelu",),
            "pooler_hidden_act": ("gelu",),
            "conv_kernel_size": (0, 3, 5, 7),
            "conv_groups": (1,),
            "conv_act": tuple(ACTIVATIONS),
            "embedding_size": (width,),
            "pooler_hidden_size": (width,),
            "attention_head_size": (width // heads if isinstance(width, int) and isinstance(heads, int) else width,),
            "norm_rel_ebd": ("none", "layer_norm"),
        }
        if not config.get("relative_attention"):  # false by default
            raise UserError("config.json: relative_attention is false, supported is true")
        kinds = config.get("pos_att_type") or ()
        kinds = tuple(kind.strip() for kind in kinds.lower().split("|")) if isinstance(kinds, str) else tuple(kinds)
        if unknown := [kind for kind in kinds if kind not in ("c2p", "p2c")]:
            raise UserError(f"config.json: pos_att_type has {unknown[0]!r}, supported is 'c2p' or 'p2c'")
        names = ("position_buckets", "max_relative_positions")  # the file has -1 for none
        sizes = {name: max(config[name], 0) for name in names if isinstance(config.get(name), int)}
        shape = config_json.read(cls, {**config, **sizes, "pos_att_type": kinds}, supported)
        config_json.check_heads(shape)
        if shape.position_buckets in (1, 2, 3) or shape.max_distance < 2:
            raise UserError(
                f"config.json: position_buckets is {shape.position_buckets} with distances up to "
                f"{shape.max_distance}, supported is 0 or at least 4, with distances of at least 2"
            )
        return shape

    @property
    def positions(self) -> int | None:
        """The maximum number of tokens; None without absolute positions."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def span(self) -> int:
        """The number of relative positions of each sign."""
        return self.position_buckets or self.max_distance

    @property
    def max_distance(self) -> int:
        return self.max_relative_positions or self.max_position_embeddings

    @property
    def names(self) -> Names:
        """The names of the weights in a checkpoint of this model."""
        return NAMES


def relative_rows(length: int, config: DebertaConfig) -> np.ndarray:
    """Returns the row of each query and key in the table of relative positions, `int32[length, length]`.

    Distances up to half the number of buckets have a row each; larger ones share rows on a logarithmic scale.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    if config.position_buckets:
        middle = config.position_buckets // 2
        near = np.abs(distance) < middle
        # float32, as in training: the edges of buckets may depend on it
        far = np.where(near, middle - 1, np.abs(distance)).astype(np.float32)
        scale = np.log(np.float32((config.max_distance - 1) / middle))
        bucket = np.ceil(np.log(far / np.float32(middle)) / scale * np.float32(middle - 1)) + middle
        distance = np.where(far <= middle, distance, bucket * np.sign(distance))
    return np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)


class Embeddings(nnx.Module):
    """The normalized sum of word embeddings and, if configured, position and segment embeddings."""

    def __init__(self, config: DebertaConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        width, dtype = config.hidden_size, options.dtype
        self.word = nnx.Embed(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.position = self.token_type = nnx.data(None)
        if config.position_biased_input:
            self.position = nnx.Embed(config.max_position_embeddings, width, dtype=dtype, rngs=rngs)
        if config.type_vocab_size:
            self.token_type = nnx.Embed(config.type_vocab_size, width, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, tokens_BL: jax.Array, types_BL: jax.Array, virtual: Virtual) -> jax.Array:
        x_BLD = virtual.begin(self.word(tokens_BL))
        if self.position is not None:
            x_BLD = x_BLD + self.position(jnp.arange(x_BLD.shape[1]))[None]
        if self.token_type is not None:
            x_BLD = x_BLD + self.token_type(virtual.pad(types_BL, 0))
        return self.dropout(self.norm(x_BLD))


class DisentangledAttention(Attention):
    """Self-attention with scores of content to content, content to position, and position to content."""

    def __init__(self, config: DebertaConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        width = config.hidden_size
        super().__init__(width, config.num_attention_heads, options, dropout=dropout, rngs=rngs)
        self.config = config
        self.pos_query = self.pos_key = nnx.data(None)
        if not config.share_att_key:
            if "c2p" in config.pos_att_type:
                self.pos_key = nnx.Linear(width, width, dtype=options.dtype, rngs=rngs)
            if "p2c" in config.pos_att_type:
                self.pos_query = nnx.Linear(width, width, dtype=options.dtype, rngs=rngs)

    def scores(self, q_BLHK: jax.Array, k_BLHK: jax.Array, *positions: jax.Array) -> jax.Array:
        """Returns the scaled scores; `positions` are the relative positions' embeddings and each pair's row in them."""
        relative_RD, rows_LL = positions
        kinds = self.config.pos_att_type
        scores_BHLL = products(q_BLHK, k_BLHK)
        relative_RD = self.dropout(relative_RD) if kinds and self.dropout is not None else relative_RD
        if "c2p" in kinds:
            k_RHK = split_heads((self.pos_key or self.key)(relative_RD), self.heads)
            by_row_BHLR = jnp.einsum("bqhk,rhk->bhqr", q_BLHK, k_RHK)
            scores_BHLL += jnp.take_along_axis(by_row_BHLR, rows_LL[None, None], axis=3)
        if "p2c" in kinds:
            q_RHK = split_heads((self.pos_query or self.query)(relative_RD), self.heads)
            by_row_BHRL = jnp.einsum("rhk,bthk->bhrt", q_RHK, k_BLHK)
            scores_BHLL += jnp.take_along_axis(by_row_BHRL, rows_LL[None, None], axis=2)
        return scores_BHLL.astype(jnp.float32) * self.scale(q_BLHK.shape[-1])

    def scale(self, width: int) -> float:
        """Returns the factor of the scores of heads of a width."""
        return (width * (1 + len(self.config.pos_att_type))) ** -0.5


class Encoder(nnx.Module):
    """The sequence of layers, and the embeddings of relative positions that all of them attend to.

    Raises:
      UserError: The layers are stacked, and a convolution would be beside the first one.
    """

    def __init__(self, config: DebertaConfig, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.config, self.options = config, options
        self.relative = nnx.Embed(2 * config.span, config.hidden_size, dtype=options.dtype, rngs=rngs)
        self.relative_norm = nnx.data(None)
        if config.norm_rel_ebd == "layer_norm":
            self.relative_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

        def attention(rngs: nnx.Rngs) -> Attention:
            return DisentangledAttention(config, options, dropout=dropout, rngs=rngs)

        self.layers = encoder_layers(config, attention, options, norm_first=False, dropout=dropout, rngs=rngs)
        self.convolution = nnx.data(None)
        if size := config.conv_kernel_size:
            if options.scan:
                raise UserError("a convolution beside the first layer needs unrolled layers, Options(scan=False)")
            width, epsilon = config.hidden_size, config.layer_norm_eps
            self.convolution = Convolution(width, size, config.conv_act, epsilon, options, dropout=dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, mask_BL: jax.Array, virtual: Virtual) -> jax.Array:
        relative_RD = self.relative(jnp.arange(2 * self.config.span))
        if self.relative_norm is not None:
            relative_RD = self.relative_norm(relative_RD)
        rows_LL = jnp.asarray(relative_rows(x_BLD.shape[1], self.config))
        shared = mask_BL, relative_RD, rows_LL
        if self.convolution is None:
            return virtual.run(self.layers, x_BLD, *shared, options=self.options)
        first, *others = self.layers
        after_BLD = virtual.of_layers(slice(1)).run([first], x_BLD, *shared, options=self.options)
        x_BLD = self.convolution(x_BLD, after_BLD, mask_BL)
        return virtual.of_layers(slice(1, None)).run(others, x_BLD, *shared, options=self.options)


class Deberta(TextEncoder):
    """Embeddings and encoder.

    Args:
      config: The shape.
      options: How the model computes. Only the attention kernel 'xla' supports positions in the scores.
      dropout: Rate on embeddings, attention weights, relative positions and both blocks of a layer while training.
      rngs: Keys of the random initial weights and of dropout.

    Raises:
      UserError: The options ask for another attention kernel.
    """

    def __init__(self, config: DebertaConfig, options: Options = DEFAULT, *, dropout: float = 0.0, rngs: nnx.Rngs):
        if options.attention != "xla":
            raise UserError(f"attention is {options.attention!r}, DeBERTa's disentangled attention supports 'xla' only")
        self.config = config
        self.embeddings = Embeddings(config, options, dropout=dropout, rngs=rngs)
        self.encoder = Encoder(config, options, dropout=dropout, rngs=rngs)


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
) -> Deberta:
    """Returns the encoder of a checkpoint in Hugging Face layout; see :func:`checkpoint.load`.

    Raises:
      UserError: The config or the weights are missing, damaged or of another architecture.
    """
    config = DebertaConfig.from_json(checkpoint.read_config(directory))
    return checkpoint.load(
        lambda rngs: Deberta(config, options, dropout=dropout, rngs=rngs),
        NAMES,
        directory,
        dtype=dtype,
        sharding=sharding,
        unused=UNUSED,
    )


_LINEARS = {"attention/{part=query|key|value|pos_query|pos_key}": "attention.self.{part}_proj", **LINEARS}
NAMES = Names(
    (
        *embedding_weights("deberta.", "word|position|token_type"),
        Weight("encoder/relative/embedding", "deberta.encoder.rel_embeddings.weight", module="embedding"),
        Weight("encoder/relative_norm/scale", "deberta.encoder.LayerNorm.weight"),
        Weight("encoder/relative_norm/bias", "deberta.encoder.LayerNorm.bias"),
        Weight("encoder/convolution/conv/kernel", "deberta.encoder.conv.conv.weight", CONV1D),
        Weight("encoder/convolution/conv/bias", "deberta.encoder.conv.conv.bias"),
        Weight("encoder/convolution/norm/scale", "deberta.encoder.conv.LayerNorm.weight"),
        Weight("encoder/convolution/norm/bias", "deberta.encoder.conv.LayerNorm.bias"),
        *layer_weights("deberta.encoder.layer.{layer}", _LINEARS, NORMS),
    ),
    prefix="deberta.",
)
# The generator and discriminator of v3 have heads for pretraining, and positions that are not added to words.
UNUSED = (
    r"position_ids$|^embeddings\.position_embeddings\.weight$|^pooler\.|^cls\.|^(lm|mask)_predictions\.|^classifier\."
    r"|^qa_outputs\."
)
