"""How a decoder is called: for logits, for losses, or a step at a time with a cache."""

import abc
import math
from typing import Any

import jax
from flax import nnx

from experiments.models import cache as caches
from experiments.models.cache import AttentionContext, Cache
from experiments.models.chunked_loss import cross_entropy
from experiments.models.options import Options


class Decoder(nnx.Module):
    """A model of the next token.

    A subclass sets `config` (its shape), `options`, `longest` (the most tokens it can tell apart; None has no
    bound) and `trained_length` (the longest sequence that its checkpoint is made for; None where that is unknown), and
    gives :meth:`embed`, :meth:`run`, :meth:`head` and :meth:`cache`.
    """

    config: Any
    options: Options
    longest: int | None = None
    trained_length: int | None = None

    def __call__(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        *,
        labels_BL: jax.Array | None = None,
        label_smoothing: float = 0.0,
        noise: tuple[jax.Array, float] | None = None,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Any:
        """Logits of the next tokens, or the losses of given ones.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          segments_BL: A mask, False (or 0) at padding; or the number of the text that a token belongs to, where a
            row packs several. A text stands together. Padding on the right needs no mask: no token sees what
            comes after it.
          positions_BL: Of the tokens; None counts from 0 in each segment, or on from the cache.
          labels_BL: The token that each place should predict, negative where none is. Their losses are returned
            and no more than `options.loss_chunk` logits a row exist at a time.
          label_smoothing: The share of each label that is spread evenly over the vocabulary.
          noise: A PRNG key and the scale of NEFTune's noise: uniform, added to what goes into the first layer, with
            a largest absolute value of the scale divided by the root of length times width.
          cache: What came before, from :meth:`cache` or an earlier call.
          last: Only the logits of the last place are wanted.

        Returns:
          Logits `float[batch, length, vocabulary]`, or `float[batch, vocabulary]` with `last`, in
          `options.dtype`; what stands at padding means nothing. With `labels_BL` losses `float32[batch, length]`
          in their place. With `cache` a pair of that and the new cache.

        Raises:
          ValueError: There are more tokens than positions, or than slots in the cache.

        References:
          Jain et al., `NEFTune <https://arxiv.org/abs/2310.05914>`_, 2023, Algorithm 1
        """
        context, x_BLD = self._embedded(tokens_BL, segments_BL, positions_BL, cache)
        if noise is not None:
            key, scale = noise
            bound = scale / math.sqrt(x_BLD.shape[1] * x_BLD.shape[2])
            x_BLD = x_BLD + jax.random.uniform(key, x_BLD.shape, x_BLD.dtype, -bound, bound)
        x_BLD, kept = self.run(x_BLD, context, None if cache is None else cache.layers)
        if labels_BL is not None:
            out = cross_entropy(self.head, x_BLD, labels_BL, chunk=self.options.loss_chunk, smoothing=label_smoothing)
        else:
            out = self.head(x_BLD[:, -1] if last else x_BLD)
        return out if cache is None else (out, caches.kept(cache, context, kept))

    def hidden(self, tokens_BL: jax.Array, mask_BL: jax.Array | None = None) -> jax.Array:
        """The last hidden states, normalized, `float[batch, length, width]`: what goes into the head.

        Args:
          tokens_BL: Token ids.
          mask_BL: False at padding; None sees no padding.

        Raises:
          ValueError: There are more tokens than positions.
        """
        context, x_BLD = self._embedded(tokens_BL, mask_BL, None, None)
        return self.run(x_BLD, context, None)[0]

    def _embedded(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None,
        positions_BL: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[AttentionContext, jax.Array]:
        self.check_length(tokens_BL.shape[1])
        context = caches.look(tokens_BL.shape, segments_BL, positions_BL, cache)
        return context, self.embed(tokens_BL, context)

    @abc.abstractmethod
    def embed(self, tokens_BL: jax.Array, context: AttentionContext) -> jax.Array:
        """What goes into the first layer."""

    @abc.abstractmethod
    def run(self, x_BLD: jax.Array, context: AttentionContext, kept: Any) -> tuple[jax.Array, Any]:
        """The last hidden states, normalized, and what the layers keep."""

    @abc.abstractmethod
    def head(self, x_BLD: jax.Array) -> jax.Array:
        """The logits of hidden states."""

    @abc.abstractmethod
    def cache(self, batch: int, slots: int) -> Cache:
        """An empty cache for `slots` tokens a row.

        Raises:
          ValueError: They are more than there are positions.
        """

    def check_length(self, tokens: int) -> None:
        """Raises a ValueError where the model cannot tell so many tokens apart."""
        if self.longest is not None and tokens > self.longest:
            raise ValueError(f"{tokens} tokens, {self.longest} positions.")
