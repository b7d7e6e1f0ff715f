"""Generates token by token, and keeps the keys and values of a text that grows, as a conversation does."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.generation.loop import Step
from experiments.generation.prefixes import prefill
from experiments.generation.sampling import filter_logits
from experiments.models.cache import Cache
from experiments.models.decoder import Decoder

_PIECES = (1, 16, 128)  # tokens that are read at a time
_SLOTS = 512  # of the first cache; each larger one has twice as many, up to the maximum length


class Session:
    """A text and its keys and values, which each call continues.

    Only tokens that the previous text does not begin with are computed. Everything is compiled for pieces of a few
    sizes and caches of a few sizes, whatever the lengths of the texts.

    Args:
      model: The decoder. Its weights are not used.
      step: Computes the next logits; see :func:`experiments.generation.make_step`.
      params: The first argument of `step`.
      key: The random key of :meth:`stream` with a temperature.
      virtual: The number of virtual tokens in `params`, whose positions texts cannot have.
    """

    def __init__(self, model: Decoder, step: Step, params: Any, key: jax.Array | None = None, *, virtual: int = 0):
        self._model, self._step, self._params, self._key, self._virtual = model, step, params, key, virtual
        self._tokens: list[int] = []  # those in the cache
        cache = model.cache(1, self._slots(1))
        if virtual:  # the caches of later calls are donated, so they have slots for virtual tokens from the start
            cache = prefill(step, params, jnp.zeros((1, 1), jnp.int32), cache=cache)
        self._cache = cache.truncate(0)
        self.tokens_read = 0
        """The number of tokens for which keys and values have been computed."""

    @property
    def longest(self) -> int | None:
        """The maximum length of a text that the model supports; None has no limit."""
        limits = [limit for limit in (self._model.longest, self._model.trained_length) if limit is not None]
        return min(limits) - self._virtual if limits else None

    def stream(
        self,
        tokens: Sequence[int],
        *,
        new_tokens: int,
        eos: Collection[int] = (),
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> Iterator[int]:
        """Yields tokens that continue a text, up to its end or the maximum length of the model.

        Args:
          tokens: The whole text so far, at least one token.
          new_tokens: Maximum number of tokens to add.
          eos: The tokens that end a text; they are not yielded.
          temperature: See :func:`experiments.generation.filter_logits`; None selects the likeliest tokens.
          top_p: See :func:`experiments.generation.filter_logits`.

        Raises:
          ValueError: The text is empty, or longer than the model supports.
        """
        tokens = list(tokens)
        if not tokens or (self.longest is not None and len(tokens) > self.longest):
            raise ValueError(f"The text has {len(tokens):,} tokens, expected 1 to {self.longest or 'any number':,}.")
        self._read(tokens[:-1])
        last = tokens[-1]
        for _ in range(new_tokens if self.longest is None else min(new_tokens, self.longest - len(tokens) + 1)):
            self._make_room(1)
            key = None
            if temperature is not None:
                if self._key is None:
                    raise ValueError(f"temperature={temperature} needs a key.")
                self._key, key = jax.random.split(self._key)
            token = jnp.full((1, 1), last, jnp.int32)
            following, self._cache = _advance(self._step, self._params, token, self._cache, key, temperature, top_p)
            self._tokens.append(last)
            self.tokens_read += 1
            last = int(following)
            if last in eos:
                return
            yield last

    def _read(self, tokens: list[int]) -> None:
        """Makes the cache hold exactly these tokens."""
        pairs = zip(tokens, self._tokens)
        shared = next((i for i, (new, old) in enumerate(pairs) if new != old), min(len(tokens), len(self._tokens)))
        self._tokens = self._tokens[:shared]
        self._cache = self._cache.truncate(shared)
        while rest := tokens[len(self._tokens) :]:
            fitting = [size for size in _PIECES if self._fits(size)]
            size = next((size for size in fitting if size >= len(rest)), fitting[-1])
            piece = rest[:size]
            self._make_room(size)
            row = jnp.asarray([piece + [0] * (size - len(piece))], jnp.int32)
            cache = _read_piece(self._step, self._params, row, jnp.arange(size)[None] < len(piece), self._cache)
            self._tokens += piece
            self._cache = cache.truncate(len(self._tokens))  # without the padding
            self.tokens_read += len(piece)

    def _fits(self, count: int) -> bool:
        return self.longest is None or len(self._tokens) + count <= self.longest

    def _make_room(self, count: int) -> None:
        slots = self._slots(len(self._tokens) + count)
        if slots > self._cache.slots:
            self._cache = self._cache.grow(slots)

    def _slots(self, tokens: int) -> int:
        slots = _SLOTS
        while slots < tokens:
            slots *= 2
        return slots if self.longest is None else min(slots, self.longest)


@functools.partial(jax.jit, static_argnames="step", donate_argnames="cache")
def _read_piece(step: Step, params: Any, tokens_1L: jax.Array, mask_1L: jax.Array, cache: Cache) -> Cache:
    return step(params, tokens_1L, mask_1L, cache)[1]


@functools.partial(jax.jit, static_argnames="step", donate_argnames="cache")
def _advance(
    step: Step,
    params: Any,
    token_11: jax.Array,
    cache: Cache,
    key: jax.Array | None,
    temperature: float | None,
    top_p: float | None,
) -> tuple[jax.Array, Cache]:
    """Reads a token and returns the next one."""
    logits_1V, cache = step(params, token_11, jnp.ones((1, 1), bool), cache)
    if key is None:
        return jnp.argmax(logits_1V[0]), cache
    return jax.random.categorical(key, filter_logits(logits_1V, temperature=temperature, top_p=top_p)[0]), cache
