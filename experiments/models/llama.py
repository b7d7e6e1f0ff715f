"""The Llama family in Flax NNX (Llama 2 and 3, Mistral, Qwen 2 and 3): token ids in, logits of the next token out.

Shapes are in the names: B examples, L tokens, D width, H heads, G groups of heads that share keys and values,
K width of a head, F hidden width, V vocabulary.

References:
  Touvron et al., `Llama 2 <https://arxiv.org/abs/2307.09288>`_, 2023
  Jiang et al., `Mistral 7B <https://arxiv.org/abs/2310.06825>`_, 2023
  Qwen Team, `Qwen3 <https://arxiv.org/abs/2505.09388>`_, 2025
"""

import dataclasses
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
from experiments.models.cache import AttentionContext, Cache, empty_cache
from experiments.models.config import parsing, read
from experiments.models.decoder import Decoder
from experiments.models.decoder_loading import Loading, load_decoder, tie_names
from experiments.models.options import DEFAULT, Options
from experiments.models.rope import Rope, apply_rope
from experiments.models.virtual import Shape
from lora_jax.peft import LINEAR, Names, Weight

# The values that transformers uses for fields that a config.json omits; a null is not an omission.
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model of the family; fields have the names of Hugging Face's `config.json` if it has them.

    Attributes:
      qkv_bias: Whether query, key and value have a bias.
      output_bias: Whether attention's output has a bias.
      qk_norm: Whether queries and keys are normalized.
      rope: The rotary position embedding.
      sliding: For each layer, whether it attends to the last `sliding_window` tokens only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    sliding: tuple[bool, ...]
    sliding_window: int = 0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    @parsing
    def from_json(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads the shape from the content of a `config.json`.

        Raises:
          UserError: A field is missing or describes something that this model does not support.
        """
        family = config.get("model_type", "llama")
        supported: dict[str, tuple[Any, ...]] = {"model_type": tuple(_ABSENT), "hidden_act": ("silu",)}
        if family in ("mistral", "qwen2"):
            supported["attention_bias"] = (False,)
        if family != "llama":
            supported["mlp_bias"] = (False,)
        full = _ABSENT.get(family, {}) | dict(config)
        heads, width = full.get("num_attention_heads"), full.get("hidden_size")
        if isinstance(heads, int) and heads > 0 and isinstance(width, int):
            full["num_key_value_heads"] = full.get("num_key_value_heads") or heads
            full["head_dim"] = full.get("head_dim") or width // heads
        bias = bool(full.get("attention_bias"))
        full |= {"qkv_bias": bias or family == "qwen2", "output_bias": bias, "qk_norm": family == "qwen3"}
        shape = read(cls, full | {"rope": Rope(()), "sliding": ()}, supported)
        shape = dataclasses.replace(
            shape, rope=Rope.from_json(full, shape.head_dim), sliding=_sliding(family, full, shape.num_hidden_layers)
        )
        if shape.num_key_value_heads < 1 or shape.num_attention_heads % shape.num_key_value_heads:
            raise UserError(
                f"config.json: num_attention_heads {shape.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {shape.num_key_value_heads}"
            )
        if shape.head_dim % 2:
            raise UserError(f"config.json: head_dim {shape.head_dim} is odd, RoPE rotates pairs of features")
        return shape


def _sliding(family: str, config: Mapping[str, Any], count: int) -> tuple[bool, ...]:
    """Returns for each layer whether its attention has a window."""
    window = config.get("sliding_window") if family != "llama" else None
    if family.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    types = config.get("layer_types")
    if family == "mistral" or types is None:
        first = 0 if family == "mistral" else config.get("max_window_layers", 0)
        return tuple(window is not None and number >= first for number in range(count))
    supported = ("full_attention", *(["sliding_attention"] if window is not None else []))
    if len(types) != count or not set(types) <= set(supported):
        raise UserError(
            f"config.json: layer_types is {types!r}, supported is one of {' or '.join(map(repr, supported))} for each "
            f"of {count} layers (with sliding_window {window})"
        )
    return tuple(kind == "sliding_attention" for kind in types)


class RMSNorm(nnx.RMSNorm):
    """Scales the last axis to unit mean square in float32; the output has the input's dtype."""

    def __init__(self, width: int, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=config.rms_norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x, mask=mask).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention in which groups of heads share a key and a value."""

    def __init__(self, config: LlamaConfig, options: Options, *, rngs: nnx.Rngs):
        width, head, self.options = config.hidden_size, config.head_dim, options
        self.shape = (config.num_attention_heads, config.num_key_value_heads, head)
        self.window = config.sliding_window if any(config.sliding) else None
        heads, groups = config.num_attention_heads * head, config.num_key_value_heads * head
        linear = functools.partial(nnx.Linear, dtype=options.dtype, rngs=rngs)
        self.query = linear(width, heads, use_bias=config.qkv_bias)
        self.key = linear(width, groups, use_bias=config.qkv_bias)
        self.value = linear(width, groups, use_bias=config.qkv_bias)
        self.output = linear(heads, width, use_bias=config.output_bias)
        self.query_norm = RMSNorm(head, config, rngs=rngs) if config.qk_norm else None
        self.key_norm = RMSNorm(head, config, rngs=rngs) if config.qk_norm else None

    def __call__(
        self, x_BLD: jax.Array, sliding: jax.Array | None, cache: Any, context: AttentionContext, rotations: Any
    ) -> tuple[jax.Array, Any]:
        (batch, length, _), (heads, groups, head) = x_BLD.shape, self.shape
        q_BLHK = self.query(x_BLD).reshape(batch, length, heads, head)
        k_BLGK = self.key(x_BLD).reshape(batch, length, groups, head)
        v_BLGK = self.value(x_BLD).reshape(batch, length, groups, head)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLGK = self.query_norm(q_BLHK), self.key_norm(k_BLGK)
        q_BLHK, k_BLGK = apply_rope(q_BLHK, rotations), apply_rope(k_BLGK, rotations)
        cache = context.write(cache, k_BLGK, v_BLGK)

        def mix(window: int | None) -> jax.Array:
            return context.attend(q_BLHK, k_BLGK, v_BLGK, cache, window, self.options)

        if sliding is None:
            mixed_BLHK = mix(self.window)
        else:
            mixed_BLHK = jax.lax.cond(sliding, lambda: mix(self.window), lambda: mix(None))
        return self.output(mixed_BLHK.reshape(batch, length, heads * head)), cache


class FeedForward(nnx.Module):
    """SwiGLU: the product of a gate and a linear layer, projected back by a third."""

    def __init__(self, config: LlamaConfig, options: Options, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        linear = functools.partial(nnx.Linear, use_bias=config.mlp_bias, dtype=options.dtype, rngs=rngs)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.silu(self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(h_BLF)


class Layer(nnx.Module):
    """Attention, then a feed-forward layer; each adds to its input, which is normalized first."""

    def __init__(self, config: LlamaConfig, options: Options, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, config, rngs=rngs)
        self.attention = Attention(config, options, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config, rngs=rngs)
        self.feed_forward = FeedForward(config, options, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, state: Any, context: AttentionContext, rotations: Any
    ) -> tuple[jax.Array, Any]:
        sliding, cache = state
        mixed_BLD, cache = self.attention(self.attention_norm(x_BLD), sliding, cache, context, rotations)
        x_BLD = x_BLD + mixed_BLD
        return x_BLD + self.feed_forward(self.feed_forward_norm(x_BLD)), (sliding, cache)


class Llama(Decoder):
    """Embedding, layers and a head, which may be tied to the embedding.

    Args:
      config: The shape.
      options: How the model computes.
      rngs: Keys of the random initial weights.
    """

    LAYER = Layer

    def __init__(self, config: LlamaConfig, options: Options = DEFAULT, *, rngs: nnx.Rngs):
        self.config, self.options = config, options
        self.longest, self.trained_length = config.rope.longest, config.rope.trained_length
        self.token = nnx.Embed(config.vocab_size, config.hidden_size, dtype=options.dtype, rngs=rngs)
        self.layers = stack.build(
            lambda rngs: self.LAYER(config, options, rngs=rngs), config.num_hidden_layers, options, rngs
        )
        if not options.scan:
            for layer, sliding in zip(self.layers, config.sliding):
                layer.attention.window = config.sliding_window if sliding else None
        self.norm = RMSNorm(config.hidden_size, config, rngs=rngs)
        if not config.tie_word_embeddings:
            self.output = nnx.Linear(
                config.hidden_size, config.vocab_size, use_bias=False, dtype=options.dtype, rngs=rngs
            )

    @property
    def shape(self) -> Shape:
        shape = self.config
        return Shape(shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, shape.hidden_size)

    def embed(self, x_BLD: jax.Array, context: AttentionContext) -> jax.Array:
        return x_BLD

    def run(
        self, x_BLD: jax.Array, context: AttentionContext, layers: Any, inputs: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        sliding = self.config.sliding
        if self.options.scan:
            # One body computes all layers, so whether a layer has a window is an array if they differ.
            states = (jnp.asarray(sliding) if len(set(sliding)) > 1 else None, layers)
        else:
            states = tuple((None, cache) for cache in (layers or [None] * len(sliding)))
        rotations = self.config.rope.rotations(context.positions_BL)
        x_BLD, states = stack.run(
            self.layers, x_BLD, context, rotations, states=states, inputs=inputs, options=self.options
        )
        layers = states[1] if self.options.scan else tuple(cache for _, cache in states)
        return self.norm(x_BLD), layers

    def head(self, x_BLD: jax.Array) -> jax.Array:
        return self.token.attend(x_BLD) if self.config.tie_word_embeddings else self.output(x_BLD)

    def cache(self, batch: int, slots: int) -> Cache:
        self.check_length(slots)
        return empty_cache(self.shape.layers, batch, slots, self.shape.groups, self.shape.head, self.options)


AXES = (
    (r"^token/embedding$", ("vocab", "embed")),
    (r"attention/query/kernel$", ("embed", "heads")),
    (r"attention/query/bias$", ("heads",)),
    (r"attention/(key|value)/kernel$", ("embed", "groups")),
    (r"attention/(key|value)/bias$", ("groups",)),
    (r"attention/output/kernel$", ("heads", "embed")),
    (r"feed_forward/(gate|up)/kernel$", ("embed", "hidden")),
    (r"feed_forward/(gate|up)/bias$", ("hidden",)),
    (r"feed_forward/down/kernel$", ("hidden", "embed")),
    (r"^output/kernel$", ("embed", "vocab")),
)
"""Names of the axes of weights, for :func:`experiments.training.mesh.weight_shardings`."""

_LAYER, _HF_LAYER = "layers/{layer}", "model.layers.{layer}"
_ATTENTION, _HF_ATTENTION = f"{_LAYER}/attention", f"{_HF_LAYER}.self_attn"
_GLU = "{part=gate|up|down}"
NAMES = Names(
    (
        Weight("token/embedding", "model.embed_tokens.weight", module="embedding"),
        Weight(f"{_ATTENTION}/query/kernel", f"{_HF_ATTENTION}.q_proj.weight", LINEAR),
        Weight(f"{_ATTENTION}/query/bias", f"{_HF_ATTENTION}.q_proj.bias"),
        Weight(f"{_ATTENTION}/query_norm/scale", f"{_HF_ATTENTION}.q_norm.weight"),
        Weight(f"{_ATTENTION}/key/kernel", f"{_HF_ATTENTION}.k_proj.weight", LINEAR),
        Weight(f"{_ATTENTION}/key/bias", f"{_HF_ATTENTION}.k_proj.bias"),
        Weight(f"{_ATTENTION}/key_norm/scale", f"{_HF_ATTENTION}.k_norm.weight"),
        Weight(f"{_ATTENTION}/value/kernel", f"{_HF_ATTENTION}.v_proj.weight", LINEAR),
        Weight(f"{_ATTENTION}/value/bias", f"{_HF_ATTENTION}.v_proj.bias"),
        Weight(f"{_ATTENTION}/output/kernel", f"{_HF_ATTENTION}.o_proj.weight", LINEAR),
        Weight(f"{_ATTENTION}/output/bias", f"{_HF_ATTENTION}.o_proj.bias"),
        Weight(f"{_LAYER}/feed_forward/{_GLU}/kernel", _HF_LAYER + ".mlp.{part}_proj.weight", LINEAR),
        Weight(f"{_LAYER}/feed_forward/{_GLU}/bias", _HF_LAYER + ".mlp.{part}_proj.bias"),
        Weight(f"{_LAYER}/attention_norm/scale", f"{_HF_LAYER}.input_layernorm.weight"),
        Weight(f"{_LAYER}/feed_forward_norm/scale", f"{_HF_LAYER}.post_attention_layernorm.weight"),
        Weight("norm/scale", "model.norm.weight"),
        Weight("output/kernel", "lm_head.weight", LINEAR),
    ),
    prefix="model.",
)
TIED_NAMES = tie_names(NAMES)
UNUSED = r"rotary_emb\.inv_freq$"  # in old checkpoints


def names(config: LlamaConfig) -> Names:
    """Returns the names of a model's weights, which depend on whether its head is tied to its embedding."""
    return TIED_NAMES if config.tie_word_embeddings else NAMES


def load(directory: Path, options: Options = DEFAULT, **loading: Unpack[Loading]) -> Llama:
    """Returns a model of the family with the weights of a checkpoint; see :func:`load_decoder`."""
    return load_decoder(
        lambda config, rngs: Llama(config, options, rngs=rngs),
        LlamaConfig.from_json,
        names,
        directory,
        UNUSED,
        **loading,
    )
