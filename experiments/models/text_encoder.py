"""What the encoders of texts share: embeddings, layers, and the check of the length.

Shapes are in the names: B examples, L tokens, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.virtual import NO_VIRTUAL, Shape, Virtual


class TextEncoder(nnx.Module):
    """A base class: embeddings and encoder.

    Attributes:
      config: The shape, with the fields of Hugging Face's `config.json`, and `positions`, the maximum number of tokens
        or None.
      embeddings: `embeddings(tokens, types, virtual)`.
      encoder: `encoder(embedded, mask, virtual)`.
    """

    config: Any
    embeddings: Any
    encoder: Any

    @property
    def shape(self) -> Shape:
        """The sizes that those of virtual tokens follow from."""
        heads, width = self.config.num_attention_heads, self.config.hidden_size
        return Shape(self.config.num_hidden_layers, heads, width // heads, width)

    def embed(self, tokens_BL: jax.Array, types_BL: jax.Array, virtual: Virtual) -> jax.Array:
        """Returns the input of the first layer, `float[batch, length, width]`."""
        return self.embeddings(tokens_BL, types_BL, virtual)

    def __call__(
        self,
        tokens_BL: jax.Array,
        mask_BL: jax.Array,
        types_BL: jax.Array | None = None,
        *,
        virtual: Virtual = NO_VIRTUAL,
    ) -> jax.Array:
        """Returns the last hidden states.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          mask_BL: True (or 1) at tokens, False at padding. RoBERTa's positions count the tokens that differ from its
            padding token, so padding must be that token.
          types_BL: Segment ids; None is segment 0 for all tokens. Ignored without segment embeddings.
          virtual: Virtual tokens. Keys and values are seen by every token and have no position, absolute or relative;
            tokens of the other forms are the first ones of every sequence, in segment 0.

        Returns:
          `float[batch, length, width]`, where the length includes the virtual tokens of a sequence; undefined at
          padding.

        Raises:
          ValueError: There are more tokens than absolute positions.
        """
        count = virtual.in_sequence + tokens_BL.shape[1]
        if self.config.positions is not None and count > self.config.positions:
            raise ValueError(f"{count} tokens, {self.config.positions} positions")
        types_BL = jnp.zeros_like(tokens_BL) if types_BL is None else types_BL
        x_BLD = self.embed(tokens_BL, types_BL, virtual)
        return self.encoder(x_BLD, virtual.pad(mask_BL.astype(bool), True), virtual)
