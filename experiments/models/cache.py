"""What tokens see of each other and of earlier calls: segments, positions, a cache of keys and values.

Shapes are in the names: B examples, L tokens of this call, T slots of the cache, H heads, G groups of heads that
share keys and values, K width of a head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import stack
from experiments.models.attention import attend
from experiments.models.options import Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in arrays whose shapes stay: a value, which calls take and return.

    All rows write to the same slots. Each slot knows its token's position, and a token sees the slots whose
    position is not after its own: padding, on whichever side, is no slot to see.

    Attributes:
      layers: A pair `keys_BTGK, values_BTGK` for each layer, in the form of :func:`experiments.models.stack.run`.
      positions_BT: Position of the token in each slot; -1 where there is none to see.
      used: How many slots are written.
      fresh: Whether none is: the first call's tokens see each other only, so that any attention kernel serves it.
    """

    layers: Any
    positions_BT: jax.Array
    used: jax.Array
    fresh: bool = dataclasses.field(metadata={"static": True})

    @property
    def slots(self) -> int:
        return self.positions_BT.shape[1]

    def select(self, rows: jax.Array) -> "Cache":
        """The cache of a batch made of these rows of this one's batch."""
        # A stacked cache has its layers first, then its rows.
        layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), self.layers)
        return dataclasses.replace(self, layers=layers, positions_BT=jnp.take(self.positions_BT, rows, axis=0))


def empty(layers: int, batch: int, slots: int, groups: int, width: int, options: Options) -> Cache:
    """A cache in which nothing is written."""
    shape_BTGK = (batch, slots, groups, width)
    pairs = [tuple(jnp.zeros(shape_BTGK, options.dtype) for _ in range(2)) for _ in range(layers)]
    return Cache(
        stack.per_layer(pairs, options), jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32), True
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What the tokens of one call see; the same for all layers.

    Attributes:
      positions_BL: Of the tokens.
      segments_BL: Tokens of one number see each other; None is one segment.
      slots_BT: Positions of the tokens in the cache, those of this call included; None without a cache.
      start: The first slot of this call.
      fresh: Whether nothing was in the cache.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None
    slots_BT: jax.Array | None = None
    start: jax.Array | None = None
    fresh: bool = dataclasses.field(default=True, metadata={"static": True})

    def attend(
        self, q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, kept: Any, window: int | None, options: Options
    ) -> jax.Array:
        """Causal attention among the tokens of the call, or to all that `kept` holds (see :meth:`write`)."""
        if self.fresh:
            return attend(
                q_BLHK,
                k_BLGK,
                v_BLGK,
                segments_BL=self.segments_BL,
                causal=True,
                window=window,
                kernel=options.attention,
                platform=options.platform,
                shards=options.shards,
            )
        assert self.slots_BT is not None
        q_BL1, slots_B1T = self.positions_BL[:, :, None], self.slots_BT[:, None, :]
        seen_BLT = (slots_B1T >= 0) & (slots_B1T <= q_BL1)
        if window is not None:
            seen_BLT &= q_BL1 - slots_B1T < window
        # One query a row is a product of a matrix and a vector: no kernel has blocks to skip there.
        keys_BTGK, values_BTGK = kept
        return attend(q_BLHK, keys_BTGK, values_BTGK, seen_BLT[:, None])

    def write(self, kept: Any, k_BLGK: jax.Array, v_BLGK: jax.Array) -> Any:
        """A layer's keys and values with those of this call; None stays None."""
        if kept is None or self.start is None:
            return None
        start = self.start
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_BTGK, new_BLGK, start, axis=1)
            for all_BTGK, new_BLGK in zip(kept, (k_BLGK, v_BLGK))
        )


def look(
    shape_BL: tuple[int, ...], segments_BL: jax.Array | None, positions_BL: jax.Array | None, cache: Cache | None
) -> AttentionContext:
    """What the tokens of a call see.

    Args:
      shape_BL: Of the tokens.
      segments_BL: 0 (or False) at padding; tokens of one number stand together and see each other. With a cache
        there is one segment a row.
      positions_BL: Of the tokens; None counts from 0 in each segment, or on from what is in the cache.
      cache: What came before.

    Raises:
      ValueError: The tokens are more than the cache has slots.
    """
    length = shape_BL[1]
    if cache is None:
        if positions_BL is None:
            positions_BL = _places(segments_BL, shape_BL)
        return AttentionContext(positions_BL, segments_BL)
    if length > cache.slots:
        raise ValueError(f"{length} tokens, {cache.slots} slots in the cache.")
    mask_BL = jnp.ones(shape_BL, bool) if segments_BL is None else segments_BL.astype(bool)
    if positions_BL is None:
        before_B1 = jnp.max(cache.positions_BT, axis=1, keepdims=True) + 1
        positions_BL = jnp.maximum(before_B1 + jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    new_BL = jnp.where(mask_BL, positions_BL, -1)
    slots_BT = jax.lax.dynamic_update_slice_in_dim(cache.positions_BT, new_BL, cache.used, axis=1)
    segments_BL = None if segments_BL is None else mask_BL.astype(jnp.int32)
    return AttentionContext(positions_BL, segments_BL, slots_BT, cache.used, cache.fresh)


def kept(cache: Cache, context: AttentionContext, layers: Any) -> Cache:
    """The cache after a call: what its layers keep, and where its tokens are."""
    assert context.slots_BT is not None
    return Cache(layers, context.slots_BT, cache.used + context.positions_BL.shape[1], False)


def _places(segments_BL: jax.Array | None, shape_BL: tuple[int, ...]) -> jax.Array:
    """Positions counted from 0 in each run of one segment."""
    index_BL = jax.lax.broadcasted_iota(jnp.int32, shape_BL, 1)
    if segments_BL is None:
        return index_BL
    segments_BL = segments_BL.astype(jnp.int32)
    begins_BL = jnp.concatenate([jnp.ones((shape_BL[0], 1), bool), segments_BL[:, 1:] != segments_BL[:, :-1]], axis=1)
    return index_BL - jax.lax.cummax(jnp.where(begins_BL, index_BL, 0), axis=1)
