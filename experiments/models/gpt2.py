"""GPT-2 in Flax NNX: token ids in, logits of the next token out.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width, V vocabulary.

References:
  Radford et al., `Language Models are Unsupervised Multitask Learners
  <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>`_, 2019
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.errors import UserError
from experiments.models import stack
from experiments.models.blocks import FeedForward, Layer, split_heads
from experiments.models.cache import AttentionContext, Cache, empty_cache
from experiments.models.config import parsing, read
from experiments.models.decoder import Decoder
from experiments.models.decoder_loading import Loading, load_decoder, tie_names
from experiments.models.norm import LayerNorm
from experiments.models.options import DEFAULT, Options
from experiments.models.virtual import Shape
from lora_jax.peft import LINEAR, Names, Weight

_SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the same function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


@dataclass(frozen=True)
class Gpt2Config:
    """The shape of a GPT-2; fields have the names of Hugging Face's `config.json`."""

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
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this model does not support.
        """
        shape = read(cls, config, _SUPPORTED)
        if shape.n_head < 1 or shape.n_embd % shape.n_head:
            raise UserError(f"config.json: n_embd {shape.n_embd} is not a multiple of n_head {shape.n_head}")
        return shape

    @property
    def hidden(self) -> int:
        """The hidden width of the feed-forward layers; four times the model's width by default."""
        return self.n_inner or 4 * self.n_embd


class Attention(nnx.Module):
    """Causal self-attention with a cache; query, key and value are one kernel."""

    def __init__(self, config: Gpt2Config, options: Options, *, rngs: nnx.Rngs):
        self.heads, self.options = config.n_head, options
        self.qkv = nnx.Linear(config.n_embd, 3 * config.n_embd, dtype=options.dtype, rngs=rngs)
        self.output = nnx.Linear(config.n_embd, config.n_embd, dtype=options.dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, cache: Any, context: AttentionContext) -> tuple[jax.Array, Any]:
        parts = jnp.split(self.qkv(x_BLD), 3, axis=-1)
        q_BLHK, k_BLHK, v_BLHK = (split_heads(part_BLD, self.heads) for part_BLD in parts)
        cache = context.write(cache, k_BLHK, v_BLHK)
        mixed_BLHK = context.attend(q_BLHK, k_BLHK, v_BLHK, cache, None, self.options)
        return self.output(mixed_BLHK.reshape(x_BLD.shape)), cache


class Gpt2(Decoder):
    """Embeddings, layers, and a head that is tied to the embedding of tokens unless the config unties it.

    Args:
      config: The shape.
      options: How the model computes.
      dropout: Rate on embeddings and both blocks of a layer while training.
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

    @property
    def shape(self) -> Shape:
        shape = self.config
        return Shape(shape.n_layer, shape.n_head, shape.n_embd // shape.n_head, shape.n_embd)

    def embed(self, x_BLD: jax.Array, context: AttentionContext) -> jax.Array:
        return self.dropout(x_BLD + self.position(context.positions_BL))

    def run(
        self, x_BLD: jax.Array, context: AttentionContext, layers: Any, inputs: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        x_BLD, layers = stack.run(self.layers, x_BLD, context, states=layers, inputs=inputs, options=self.options)
        return self.norm(x_BLD), layers

    def head(self, x_BLD: jax.Array) -> jax.Array:
        return self.token.attend(x_BLD) if self.config.tie_word_embeddings else self.output(x_BLD)

    def cache(self, batch: int, slots: int) -> Cache:
        self.check_length(slots)
        return empty_cache(self.shape.layers, batch, slots, self.shape.groups, self.shape.head, self.options)


def _layer(config: Gpt2Config, options: Options, dropout: float, rngs: nnx.Rngs) -> Layer:
    return Layer(
        lambda rngs: Attention(config, options, rngs=rngs),
        lambda rngs: FeedForward(config.n_embd, config.hidden, options, approximate=True, rngs=rngs),
        config.n_embd,
        config.layer_norm_epsilon,
        norm_first=True,
        dropout=dropout,
        rngs=rngs,
    )


AXES = (
    (r"^token/embedding$", ("vocab", "embed")),
    (r"attention/qkv/kernel$", ("embed", None)),  # fused from three parts, which a division would cut
    (r"attention/output/kernel$", (None, "embed")),
    (r"feed_forward/up/kernel$", ("embed", "hidden")),
    (r"feed_forward/up/bias$", ("hidden",)),
    (r"feed_forward/down/kernel$", ("hidden", "embed")),
    (r"^output/kernel$", ("embed", "vocab")),
)
"""Names of the axes of weights, for :func:`experiments.training.mesh.weight_shardings`."""

_LAYER, _HF_LAYER = "layers/{layer}", "transformer.h.{layer}"
UNTIED_NAMES = Names(
    (
        Weight("token/embedding", "transformer.wte.weight", module="embedding"),
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
NAMES = tie_names(UNTIED_NAMES)
UNUSED = r"^h\.\d+\.attn\.(bias|masked_bias)$"  # causal masks, in old checkpoints


def names(config: Gpt2Config) -> Names:
    """Returns the names of a model's weights, which depend on whether its head is tied to its embedding."""
    return NAMES if config.tie_word_embeddings else UNTIED_NAMES


def load(directory: Path, options: Options = DEFAULT, *, dropout: float = 0.0, **loading: Unpack[Loading]) -> Gpt2:
    """Returns a GPT-2 with the weights of a checkpoint; see :func:`load_decoder`."""
    return load_decoder(
        lambda config, rngs: Gpt2(config, options, dropout=dropout, rngs=rngs),
        Gpt2Config.from_json,
        names,
        directory,
        UNUSED,
        **loading,
    )
