"""The blocks that GPT-2, ViT, BERT and DeBERTa share: attention, feed-forward layers, residual layers.

Shapes are in the names: B examples, L tokens, D width, H heads, K width of a head, F hidden width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import stack
from experiments.models.attention import attend
from experiments.models.norm import LayerNorm
from experiments.models.options import Options


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Splits the last axis into heads and the width of a head."""
    return x.reshape(*x.shape[:-1], heads, -1)


class Attention(nnx.Module):
    """Multi-head self-attention without causality; query, key, value and output have a kernel each.

    Args:
      width: Of the input and of the output.
      heads: Number of heads.
      options: How to compute. Dropped attention weights need the 'xla' kernel, which then replaces the chosen one.
      qkv_bias: Whether query, key and value have a bias.
      dropout: Rate on attention weights while training; None omits the dropout layer.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        options: Options,
        *,
        qkv_bias: bool = True,
        dropout: float | None = None,
        rngs: nnx.Rngs,
    ):
        def linear(use_bias: bool = True) -> nnx.Linear:
            return nnx.Linear(width, width, use_bias=use_bias, dtype=options.dtype, rngs=rngs)

        self.heads, self.options = heads, options
        self.query, self.key, self.value = (linear(qkv_bias) for _ in range(3))
        self.output = linear()
        self.dropout = None if dropout is None else nnx.Dropout(dropout, rngs=rngs)

    def __call__(
        self, x_BLD: jax.Array, state: Any, mask_BL: jax.Array | None = None, *positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Returns the output and the state, as :func:`experiments.models.stack.run` expects of a layer.

        Args:
          x_BLD: `[batch, length, width]`.
          state: Keys and values `[tokens, heads, head width]` of virtual tokens, to which every token attends; None
            without them. Virtual tokens need the 'xla' kernel, which then replaces the chosen one.
          mask_BL: True at tokens, False at padding; None without padding.
          *positions: What :meth:`scores` of a subclass takes in addition.
        """
        q_BLHK, k_BLHK, v_BLHK = (split_heads(f(x_BLD), self.heads) for f in (self.query, self.key, self.value))
        mask_B11L, kernel = None if mask_BL is None else mask_BL[:, None, None, :], self.options.attention
        drops = self.dropout is not None and self.dropout.rate and not self.dropout.deterministic
        if kernel == "xla" or drops or state is not None:
            scores_BHLL = self.scores(q_BLHK, k_BLHK, *positions)
            if state is not None:
                scores_BHLL, v_BLHK, mask_B11L = self._prepend(state, q_BLHK, scores_BHLL, v_BLHK, mask_B11L)
            mixed_BLHK = self._mix(scores_BHLL, v_BLHK, mask_B11L)
        else:
            mask, segments = (None, mask_BL) if kernel == "flash" else (mask_B11L, None)
            platform, shards = self.options.platform, self.options.shards
            mixed_BLHK = attend(
                q_BLHK, k_BLHK, v_BLHK, mask, segments_BL=segments, kernel=kernel, platform=platform, shards=shards
            )
        return self.output(mixed_BLHK.reshape(x_BLD.shape)), state

    def scores(self, q_BLHK: jax.Array, k_BLHK: jax.Array, *positions: jax.Array) -> jax.Array:
        """Returns the scaled scores `float32[batch, heads, queries, keys]`."""
        return products(q_BLHK, k_BLHK).astype(jnp.float32) * self.scale(q_BLHK.shape[-1])

    def scale(self, width: int) -> float:
        """Returns the factor of the scores of heads of a width."""
        return width**-0.5

    def _prepend(
        self, state: Any, q_BLHK: jax.Array, scores_BHLT: jax.Array, v_BTHK: jax.Array, mask_B11T: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns scores, values and mask with those of virtual tokens, which have no positions, before the others."""
        k_PHK, more_PHK = (x.astype(q_BLHK.dtype) for x in state)
        more_BHLP = jnp.einsum("bqhk,phk->bhqp", q_BLHK, k_PHK).astype(jnp.float32) * self.scale(q_BLHK.shape[-1])
        more_BPHK = jnp.broadcast_to(more_PHK, (len(v_BTHK), *more_PHK.shape))
        if mask_B11T is not None:
            mask_B11T = jnp.pad(mask_B11T, ((0, 0), (0, 0), (0, 0), (len(k_PHK), 0)), constant_values=True)
        return jnp.concatenate([more_BHLP, scores_BHLT], 3), jnp.concatenate([more_BPHK, v_BTHK], 1), mask_B11T

    def _mix(self, scores_BHLT: jax.Array, v_BTHK: jax.Array, mask_B11T: jax.Array | None) -> jax.Array:
        """Computes what `attend` does from given scores, with dropout of attention weights."""
        if mask_B11T is not None:
            scores_BHLT = jnp.where(mask_B11T, scores_BHLT, jnp.finfo(jnp.float32).min)
        weights_BHLT = jax.nn.softmax(scores_BHLT, axis=-1).astype(v_BTHK.dtype)
        weights_BHLT = weights_BHLT if self.dropout is None else self.dropout(weights_BHLT)
        return jnp.einsum("bhqt,bthk->bqhk", weights_BHLT, v_BTHK)


def products(q_BLHK: jax.Array, k_BLHK: jax.Array) -> jax.Array:
    """Returns the products of queries and keys, `[batch, heads, queries, keys]`."""
    return jnp.einsum("bqhk,bthk->bhqt", q_BLHK, k_BLHK)


class FeedForward(nnx.Module):
    """Two linear layers with a GELU between them.

    Args:
      width: Of the input and of the output.
      hidden: Width between the layers.
      options: How to compute.
      approximate: Whether the GELU is the approximation by tanh.
      rngs: Keys of the random initial weights.
    """

    def __init__(self, width: int, hidden: int, options: Options, *, approximate: bool = False, rngs: nnx.Rngs):
        self.approximate = approximate
        self.up = nnx.Linear(width, hidden, dtype=options.dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, width, dtype=options.dtype, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        h_BLF = jax.nn.gelu(self.up(x_BLD), approximate=self.approximate)
        return self.down(h_BLF)


class Layer(nnx.Module):
    """Attention, then a feed-forward layer; each adds to its input.

    Args:
      attention: Makes the attention block: `attention(rngs)(x, state, *shared) -> (x, state)`.
      feed_forward: Makes the feed-forward layer.
      width: Of tokens.
      epsilon: Of the normalizations.
      norm_first: Whether the input of either block is normalized, and not the sum.
      dropout: Rate on the output of either block while training.
      rngs: Keys of the random initial weights and of dropout.
    """

    def __init__(
        self,
        attention: Callable[[nnx.Rngs], Any],
        feed_forward: Callable[[nnx.Rngs], Any],
        width: int,
        epsilon: float,
        *,
        norm_first: bool,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        self.norm_first = norm_first
        self.attention_norm = LayerNorm(width, epsilon, rngs=rngs)
        self.attention = attention(rngs)
        self.feed_forward_norm = LayerNorm(width, epsilon, rngs=rngs)
        self.feed_forward = feed_forward(rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x_BLD: jax.Array, state: Any, *shared: Any) -> tuple[jax.Array, Any]:
        if self.norm_first:
            mixed_BLD, state = self.attention(self.attention_norm(x_BLD), state, *shared)
            x_BLD = x_BLD + self.dropout(mixed_BLD)
            return x_BLD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BLD))), state
        mixed_BLD, state = self.attention(x_BLD, state, *shared)
        x_BLD = self.attention_norm(x_BLD + self.dropout(mixed_BLD))
        return self.feed_forward_norm(x_BLD + self.dropout(self.feed_forward(x_BLD))), state


def encoder_layers(
    config: Any,
    attention: Callable[[nnx.Rngs], Any],
    options: Options,
    *,
    norm_first: bool,
    dropout: float,
    rngs: nnx.Rngs,
) -> stack.Layers:
    """Builds the layers of an encoder, whose config has the fields of Hugging Face's `config.json`.

    Args:
      config: The shape: `num_hidden_layers`, `hidden_size`, `intermediate_size`, `layer_norm_eps`.
      attention: See :class:`Layer`.
      options: How to compute.
      norm_first: See :class:`Layer`.
      dropout: See :class:`Layer`.
      rngs: Keys of the random initial weights and of dropout.
    """
    width = config.hidden_size

    def layer(rngs: nnx.Rngs) -> Layer:
        return Layer(
            attention,
            lambda rngs: FeedForward(width, config.intermediate_size, options, rngs=rngs),
            width,
            config.layer_norm_eps,
            norm_first=norm_first,
            dropout=dropout,
            rngs=rngs,
        )

    return stack.build(layer, config.num_hidden_layers, options, rngs)
