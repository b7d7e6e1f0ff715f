"""GPT-2 in Flax NNX: token ids in, logits of the next token out.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width, V vocabulary.

References:
  Radford et al., `Language Models are Unsupervised Multitask Learners
  <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_, 2019
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import UserError
from experiments.models import cache as caches
from experiments.models import checkpoint, stack
from experiments.models.cache import AttentionContext, Cache
from experiments.models.config import parsing, read
from experiments.models.decoder import Decoder
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from lora_jax.peft import LINEAR, Names, Weight
from lora_jax.quantization import Format

_SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class Gpt2Config:
    """The shape of a GPT-2; names are those of Hugging Face's `config.json`."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int = 0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    @classmethod
    @parsing
    def from_json(cls, config: Mapping[str, Any]) -> "Gpt2Config":
        """The shape that a `config.json` describes.

        Raises:
          UserError: It lacks a field or describes something that this model does not compute.
        """
        shape = read(cls, config, _SUPPORTED)
        if shape.n_head < 1 or shape.n_embd % shape.n_head:
            raise UserError(f"config.json: n_embd {shape.n_embd} is no multiple of n_head {shape.n_head}")
        return shape

    @property
    def hidden(self) -> int:
        """The hidden width of the feed-forward part: four times the model's where the config leaves it out."""
        return self.n_inner or 4 * self.n_embd


class Attention(nnx.Module):
    """Causal self-attention; query, key and value are one kernel."""

    def __init__(self, config: Gpt2Config, options: Options, *, rngs: nnx.Rngs):
        self.heads, self.options = config.n_head, options
        self.qkv = nnx.Linear(config.n_embd, 3 * config.n_embd, dtype=options.dtype, rngs=rngs)
        self.output = nnx.Linear(config.n_embd, config.n_embd, dtype=options.dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, kept: Any, context: AttentionContext) -> tuple[jax.Array, Any]:
        shape_BLHK = (*x_BLD.shape[:2], self.heads, -1)
        q_BLHK, k_BLHK, v_BLHK = (part.reshape(shape_BLHK) for part in jnp.split(self.qkv(x_BLD), 3, axis=-1))
        kept = context.write(kept, k_BLHK, v_BLHK)
        mixed_BLHK = context.attend(q_BLHK, k_BLHK, v_BLHK, kept, None, self.options)
        return self.output(mixed_BLHK.reshape(x_BLD.shape)), kept


class FeedForward(nnx.Module):
    """Two linear layers with a (tanh-approximated) GELU between them."""

    def __init__(self, config: Gpt2Config, options: Options, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(config.n_embd, config.hidden, dtype=options.dtype, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.n_embd, dtype=options.dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.gelu(self.up(x_BLD), approximate=True)
        return self.down(h_BLF)


class Layer(nnx.Module):
    """Attention, then feed-forward; each is given its normalized input and adds to it."""

    def __init__(self, config: Gpt2Config, options: Options, *, dropout: float, rngs: nnx.Rngs):
        self.attention_norm = LayerNorm(config.n_embd, config.layer_norm_epsilon, rngs=rngs)
        self.attention = Attention(config, options, rngs=rngs)
        self.feed_forward_norm = LayerNorm(config.n_embd, config.layer_norm_epsilon, rngs=rngs)
        self.feed_forward = FeedForward(config, options, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, kept: Any, context: AttentionContext) -> tuple[jax.Array, Any]:
        mixed_BLD, kept = self.attention(self.attention_norm(x_BLD), kept, context)
        x_BLD = x_BLD + self.dropout(mixed_BLD)
        return x_BLD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BLD))), kept


class Gpt2(Decoder):
    """Embeddings, layers, and a head that is the embedding of tokens once more (unless the config unties it).

    Args:
      config: The shape.
      options: How to compute.
      dropout: Rate on embeddings and both branches of a layer, while training.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(self, config: Gpt2Config, options: Options = DEFAULT, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.config, self.options = config, options
        self.longest = self.trained_length = config.n_positions
        self.token = nnx.Embed(config.vocab_size, config.n_embd, dtype=options.dtype, rngs=rngs)
        self.position = nnx.Embed(config.n_positions, config.n_embd, dtype=options.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        make = functools.partial(_layer, config, options, dropout)
        self.layers = stack.build(make, config.n_layer, options, rngs)
        self.norm = LayerNorm(config.n_embd, config.layer_norm_epsilon, rngs=rngs)
        if not config.tie_word_embeddings:
            self.output = nnx.Linear(config.n_embd, config.vocab_size, use_bias=False, dtype=options.dtype, rngs=rngs)

    def embed(self, tokens_BL: jax.Array, context: AttentionContext) -> jax.Array:
        return self.dropout(self.token(tokens_BL) + self.position(context.positions_BL))

    def run(self, x_BLD: jax.Array, context: AttentionContext, kept: Any) -> tuple[jax.Array, Any]:
        x_BLD, kept = stack.run(self.layers, x_BLD, context, each=kept, options=self.options)
        return self.norm(x_BLD), kept

    def head(self, x_BLD: jax.Array) -> jax.Array:
        return self.token.attend(x_BLD) if self.config.tie_word_embeddings else self.output(x_BLD)

    def cache(self, batch: int, slots: int) -> Cache:
        self.check_length(slots)
        shape = self.config
        return caches.empty(shape.n_layer, batch, slots, shape.n_head, shape.n_embd // shape.n_head, self.options)


def _layer(config: Gpt2Config, options: Options, dropout: float, rngs: nnx.Rngs) -> Layer:
    return Layer(config, options, dropout=dropout, rngs=rngs)


AXES = (
    (r"^token/embedding$", ("vocab", "embed")),
    (r"attention/qkv/kernel$", ("embed", None)),  # three parts: what divides the whole cuts through them
    (r"attention/output/kernel$", (None, "embed")),
    (r"feed_forward/up/kernel$", ("embed", "hidden")),
    (r"feed_forward/up/bias$", ("hidden",)),
    (r"feed_forward/down/kernel$", ("hidden", "embed")),
    (r"^output/kernel$", ("embed", "vocab")),
)
"""What the axes of a weight are, for :func:`experiments.training.mesh.of_weights`."""

_LAYER, _HF_LAYER = "layers/{layer}", "transformer.h.{layer}"
_TOKEN = Weight("token/embedding", "transformer.wte.weight", module="embedding")
UNTIED_NAMES = Names(
    (
        _TOKEN,
        Weight("position/embedding", "transformer.wpe.weight", module="embedding"),
        Weight(f"{_LAYER}/attention_norm/scale", f"{_HF_LAYER}.ln_1.weight"),
        Weight(f"{_LAYER}/attention_norm/bias", f"{_HF_LAYER}.ln_1.bias"),
        Weight(f"{_LAYER}/attention/qkv/kernel", f"{_HF_LAYER}.attn.c_attn.weight", module="conv1d"),
        Weight(f"{_LAYER}/attention/qkv/bias", f"{_HF_LAYER}.attn.c_attn.bias"),
        Weight(f"{_LAYER}/attention/output/kernel", f"{_HF_LAYER}.attn.c_proj.weight", module="conv1d"),
        Weight(f"{_LAYER}/attention/output/bias", f"{_HF_LAYER}.attn.c_proj.bias"),
        Weight(f"{_LAYER}/feed_forward_norm/scale", f"{_HF_LAYER}.ln_2.weight"),
        Weight(f"{_LAYER}/feed_forward_norm/bias", f"{_HF_LAYER}.ln_2.bias"),
        Weight(f"{_LAYER}/feed_forward/up/kernel", f"{_HF_LAYER}.mlp.c_fc.weight", module="conv1d"),
        Weight(f"{_LAYER}/feed_forward/up/bias", f"{_HF_LAYER}.mlp.c_fc.bias"),
        Weight(f"{_LAYER}/feed_forward/down/kernel", f"{_HF_LAYER}.mlp.c_proj.weight", module="conv1d"),
        Weight(f"{_LAYER}/feed_forward/down/bias", f"{_HF_LAYER}.mlp.c_proj.bias"),
        Weight("norm/scale", "transformer.ln_f.weight"),
        Weight("norm/bias", "transformer.ln_f.bias"),
        Weight("output/kernel", "lm_head.weight", LINEAR),
    ),
    prefix="transformer.",
)
_TIED = dataclasses.replace(_TOKEN, tied=("lm_head.weight",))
NAMES = dataclasses.replace(
    UNTIED_NAMES, weights=tuple(_TIED if row is _TOKEN else row for row in UNTIED_NAMES.weights)
)
UNUSED = r"^h\.\d+\.attn\.(bias|masked_bias)$"  # causal masks, in old checkpoints


def names(config: Gpt2Config) -> Names:
    """The names of a model's weights, which depend on whether its head is its embedding."""
    return NAMES if config.tie_word_embeddings else UNTIED_NAMES


def load(
    directory: Path,
    options: Options = DEFAULT,
    *,
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    sharding: checkpoint.Sharding | None = None,
    rules: Mapping[str, Format | None] | None = None,
    untied: bool = False,
) -> Gpt2:
    """A GPT-2 with the weights of a checkpoint in Hugging Face layout.

    Args:
      directory: Holds `config.json` and safetensors.
      options: How to compute.
      dropout: See :class:`Gpt2`.
      dtype: Of the weights; None keeps what is stored.
      sharding: See :func:`experiments.models.checkpoint.load`.
      rules: Weights to quantize as they are read; likewise.
      untied: Whether a head that is the embedding becomes a weight of its own, with the embedding's values.

    Raises:
      UserError: The directory's config or weights are missing, damaged or of another architecture.
    """
    config = Gpt2Config.from_json(checkpoint.read_config(directory, untied=untied))
    return checkpoint.load(
        lambda rngs: Gpt2(config, options, dropout=dropout, rngs=rngs),
        names(config),
        directory,
        dtype=dtype,
        sharding=sharding,
        unused=UNUSED,
        rules=rules,
        copies={"lm_head.weight": _TOKEN.name} if untied else None,
        example=(jax.ShapeDtypeStruct((1, 8), jnp.int32),),
    )
