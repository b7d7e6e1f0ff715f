"""The interface of decoders: logits, losses, or one step at a time with a cache."""

import abc
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import stack
from experiments.models.cache import AttentionContext, Cache, make_context, update_cache
from experiments.models.chunked_loss import cross_entropy
from experiments.models.options import Options
from experiments.models.virtual import NO_VIRTUAL, Shape, Virtual


class Decoder(nnx.Module):
    """A language model that predicts the next token.

    A subclass sets `config` (its shape), `options`, `token` (the embedding of tokens), `longest` (its number of
    positions; None has no limit) and `trained_length` (the longest sequence that its checkpoint supports; None if
    unknown), and defines :meth:`embed`, :meth:`run`, :meth:`head`, :meth:`cache` and :attr:`shape`.
    """

    config: Any
    options: Options
    token: nnx.Embed
    longest: int | None = None
    trained_length: int | None = None

    def __call__(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        *,
        labels_BL: jax.Array | None = None,
        max_labels: int | None = None,
        label_smoothing: float = 0.0,
        readout: Callable[[Callable[[jax.Array], jax.Array], jax.Array], Any] | None = None,
        noise: tuple[jax.Array, float] | None = None,
        cache: Cache | None = None,
        last: bool = False,
        virtual: Virtual = NO_VIRTUAL,
    ) -> Any:
        """Returns the logits of the next tokens, or the losses of labels.

        Args:
          tokens_BL: Token ids, `int[batch, length]`.
          segments_BL: A mask, False (or 0) at padding; or, if a row packs several texts, the number of the text that
            a token belongs to. The tokens of a text are contiguous. Padding on the right needs no mask, since
            attention is causal.
          positions_BL: The positions of the tokens; None counts from 0 in each segment, or continues from the cache.
          labels_BL: The label of each token; negative labels are ignored. Losses are returned, and at most
            `options.loss_chunk` logits per row exist at a time.
          max_labels: The largest number of labels of a row that are not ignored, as a static bound. The head then
            computes logits only where there are labels; see :func:`experiments.models.chunked_loss.cross_entropy`.
          label_smoothing: The fraction of each label that is spread evenly over the vocabulary.
          readout: `readout(head, x_BLD)` returns another result than the logits from the head, a function of hidden
            states, and its input; see :func:`experiments.models.chunked_loss.map_chunks`.
          noise: A PRNG key and the scale of NEFTune's noise, which is added to the input of the first layer: uniform
            with absolute values up to the scale divided by the square root of length times width.
          cache: The tokens of earlier calls, from :meth:`cache` or an earlier call.
          last: Whether to return the logits of the last token only.
          virtual: Virtual tokens before the text, at the first positions. They have no logits. A cache that already
            has them stays as it is; one without them receives slots for them. Attention then uses the kernel 'xla'.

        Returns:
          Logits `float[batch, length, vocabulary]`, or `float[batch, vocabulary]` with `last`, in
          `options.dtype`; undefined at padding. With `labels_BL`, losses `float32[batch, length]` instead. With
          `cache`, a pair of that and the new cache.

        Raises:
          ValueError: There are more tokens than positions, or more tokens than slots in the cache, or the cache has
            another number of virtual tokens.

        References:
          Jain et al., `NEFTune <https://arxiv.org/abs/2310.05914>`_, 2023, Algorithm 1
        """
        context, x_BLD, first = self._embedded(tokens_BL, segments_BL, positions_BL, cache, virtual)
        if noise is not None:
            key, scale = noise
            bound = scale / math.sqrt(x_BLD.shape[1] * x_BLD.shape[2])
            x_BLD = x_BLD + jax.random.uniform(key, x_BLD.shape, x_BLD.dtype, -bound, bound)
        x_BLD, layers = self.run(x_BLD, context, None if first is None else first.layers)
        if labels_BL is not None:
            out = cross_entropy(
                self.head,
                x_BLD,
                labels_BL,
                chunk=self.options.loss_chunk,
                smoothing=label_smoothing,
                max_labels=max_labels,
            )
        elif readout is not None:
            out = readout(self.head, x_BLD)
        else:
            out = self.head(x_BLD[:, -1] if last else x_BLD)
        return out if cache is None or first is None else (out, update_cache(first, context, layers))

    def hidden(
        self, tokens_BL: jax.Array, mask_BL: jax.Array | None = None, *, virtual: Virtual = NO_VIRTUAL
    ) -> jax.Array:
        """Returns the normalized last hidden states `float[batch, length, width]`, which are the input of the head.

        Args:
          tokens_BL: Token ids.
          mask_BL: False at padding; None without padding.
          virtual: Virtual tokens before the text, which have no hidden states in the result.

        Raises:
          ValueError: There are more tokens than positions.
        """
        context, x_BLD, first = self._embedded(tokens_BL, mask_BL, None, None, virtual)
        return self.run(x_BLD, context, None if first is None else first.layers)[0]

    def _embedded(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None,
        positions_BL: jax.Array | None,
        cache: Cache | None,
        virtual: Virtual,
    ) -> tuple[AttentionContext, jax.Array, Cache | None]:
        """Returns the attention context, the input of the first layer, and the cache with the virtual tokens."""
        packed, (batch, length) = cache is None and virtual.count > 0, tokens_BL.shape
        self.check_length(virtual.count + length)
        if virtual.count:
            cache = self._prepend(virtual, self.cache(batch, length) if cache is None else cache)
        context = make_context(tokens_BL.shape, segments_BL, positions_BL, cache, packed=packed)
        return context, self.embed(self.token(tokens_BL), context), cache

    def _prepend(self, virtual: Virtual, cache: Cache) -> Cache:
        """Returns a cache that begins with virtual tokens."""
        if cache.virtual == virtual.count:
            return cache
        if cache.virtual:
            raise ValueError(f"The cache begins with {cache.virtual} virtual tokens, expected {virtual.count}.")
        if not cache.fresh:
            raise ValueError(
                f"The cache is used and does not begin with the {virtual.count} virtual tokens; start from an empty "
                f"cache, a generation.Session with virtual={virtual.count}."
            )
        self.check_length(virtual.count + cache.slots)
        rows = 1 if self.options.shards is None else len(cache.positions_BT)  # a mesh divides the rows of a batch only
        empty = self.cache(rows, virtual.count).truncate(0)  # a used cache, since kernels do not take few tokens
        context = make_context((rows, virtual.count), None, None, empty)
        if virtual.pair_NPGK is not None:
            pair_NBPGK = tuple(jnp.repeat(x[:, None], rows, axis=1) for x in virtual.pair_NPGK)
            layers = stack.unstack_states(pair_NBPGK, self.options)
        else:
            # Earlier tokens do not see later ones, so the keys and values of virtual tokens are those of every text.
            nothing_B0D = jnp.zeros((rows, 0, self.shape.width), self.options.dtype)
            x_BPD = self.embed(virtual.begin(nothing_B0D), context)
            _, layers = self.run(x_BPD, context, empty.layers, virtual.inputs_NPD)
        return cache.prepend(update_cache(empty, context, layers))

    @property
    @abc.abstractmethod
    def shape(self) -> Shape:
        """The sizes that those of virtual tokens follow from."""

    @abc.abstractmethod
    def embed(self, x_BLD: jax.Array, context: AttentionContext) -> jax.Array:
        """Returns the input of the first layer from the embeddings of tokens."""

    @abc.abstractmethod
    def run(
        self, x_BLD: jax.Array, context: AttentionContext, layers: Any, inputs: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Returns the normalized last hidden states and the new caches of the layers, `Cache.layers`.

        Args:
          x_BLD: The input of the first layer.
          context: Which tokens the tokens attend to.
          layers: The caches of the layers; None without a cache.
          inputs: See :func:`experiments.models.stack.run`.
        """

    @abc.abstractmethod
    def head(self, x_BLD: jax.Array) -> jax.Array:
        """Returns the logits of hidden states."""

    @abc.abstractmethod
    def cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache for `slots` tokens per row.

        Raises:
          ValueError: There are more slots than positions.
        """

    def check_length(self, tokens: int) -> None:
        """Raises a ValueError if the model has fewer positions than `tokens`."""
        if self.longest is not None and tokens > self.longest:
            raise ValueError(f"{tokens} tokens, {self.longest} positions.")
