"""Which tokens attend to which: segments, positions, and a cache of the keys and values of earlier calls.

Shapes are in the names: B examples, L tokens of this call, T slots of the cache, H heads, G groups of heads that
share keys and values, K width of a head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import stack
from experiments.models.attention import attend
from experiments.models.options import Options
from experiments.renamed import raise_missing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, in arrays of fixed shapes; calls take a cache and return a new one.

    All rows write to the same slots. A slot stores the position of its token, and a token attends to the slots whose
    position is at most its own. Padding, on either side, has position -1 and is masked.

    Attributes:
      layers: A pair `keys_BTGK, values_BTGK` for each layer, as :func:`experiments.models.stack.run` takes it.
      positions_BT: The position of the token in each slot; -1 for an empty slot or padding.
      used: The number of slots that are written.
      fresh: Whether no slot is written. The tokens of the first call attend to each other only, so every attention
        kernel supports it.
      virtual: The number of virtual tokens, which are in the first slots; see :meth:`prepend`.
    """

    layers: Any
    positions_BT: jax.Array
    used: jax.Array
    fresh: bool = dataclasses.field(metadata={"static": True})
    virtual: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """The number of slots for tokens of texts."""
        return self.positions_BT.shape[1] - self.virtual

    def prepend(self, virtual: "Cache") -> "Cache":
        """Returns an empty cache with slots that hold the tokens of a full one before its own.

        Args:
          virtual: A cache without free slots, with one row for all rows or as many rows.
        """
        count = virtual.positions_BT.shape[1]

        def join(first: jax.Array, rest: jax.Array) -> jax.Array:
            shape = (*rest.shape[:-3], count, *rest.shape[-2:])
            return jnp.concatenate([jnp.broadcast_to(first.astype(rest.dtype), shape), rest], axis=-3)

        first_BP = jnp.broadcast_to(virtual.positions_BT, (self.positions_BT.shape[0], count))
        layers = jax.tree.map(join, virtual.layers, self.layers)
        positions_BT = jnp.concatenate([first_BP, self.positions_BT], axis=1)
        return Cache(layers, positions_BT, virtual.used, False, count)

    def select(self, rows: jax.Array) -> "Cache":
        """Returns the cache of a batch that consists of the given rows of this batch."""
        # A stacked cache has a leading axis of layers before the axis of rows.
        layers = jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), self.layers)
        return dataclasses.replace(self, layers=layers, positions_BT=jnp.take(self.positions_BT, rows, axis=0))

    def truncate(self, used: int) -> "Cache":
        """Returns the cache with the virtual tokens and those of the first `used` slots of texts only. An empty cache
        counts as used from then on, so that the first call is compiled like all others."""
        used += self.virtual
        is_kept_1T = jnp.arange(self.positions_BT.shape[1])[None] < used
        positions_BT = jnp.where(is_kept_1T, self.positions_BT, -1)
        return Cache(self.layers, positions_BT, jnp.asarray(used, jnp.int32), False, self.virtual)

    def grow(self, slots: int) -> "Cache":
        """Returns the cache with more slots."""
        more = slots - self.slots

        def pad(x: jax.Array, axis: int, value: int) -> jax.Array:
            return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)], constant_values=value)

        layers = jax.tree.map(lambda x: pad(x, -3, 0), self.layers)
        return dataclasses.replace(self, layers=layers, positions_BT=pad(self.positions_BT, 1, -1))


def empty_cache(layers: int, batch: int, slots: int, groups: int, width: int, options: Options) -> Cache:
    """Returns a cache without tokens."""
    shape_BTGK = (batch, slots, groups, width)
    pairs = [tuple(jnp.zeros(shape_BTGK, options.dtype) for _ in range(2)) for _ in range(layers)]
    return Cache(
        stack.stack_states(pairs, options), jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32), True
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """Which tokens the tokens of one call attend to; the same for all layers.

    Attributes:
      positions_BL: The positions of the tokens.
      segments_BL: Tokens attend to tokens of the same segment; None is one segment.
      slots_BT: The positions of the tokens in the cache, including those of this call; None without a cache.
      start: The first slot of this call.
      fresh: Whether the cache was empty.
      packed: Whether the cache held virtual tokens only, which all segments attend to.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None
    slots_BT: jax.Array | None = None
    start: jax.Array | None = None
    fresh: bool = dataclasses.field(default=True, metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def attend(
        self, q_BLHK: jax.Array, k_BLGK: jax.Array, v_BLGK: jax.Array, cache: Any, window: int | None, options: Options
    ) -> jax.Array:
        """Computes causal attention among the tokens of the call, or to a layer's cache (see :meth:`write`)."""
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
        visible_BLT = (slots_B1T >= 0) & (slots_B1T <= q_BL1)
        if window is not None:
            visible_BLT &= q_BL1 - slots_B1T < window
        if self.packed and self.segments_BL is not None:
            same_BLL = self.segments_BL[:, :, None] == self.segments_BL[:, None, :]
            virtual = visible_BLT.shape[2] - same_BLL.shape[2]
            visible_BLT &= jnp.pad(same_BLL, ((0, 0), (0, 0), (virtual, 0)), constant_values=True)
        # One query per row is a matrix-vector product, in which a kernel has no blocks to skip.
        keys_BTGK, values_BTGK = cache
        return attend(q_BLHK, keys_BTGK, values_BTGK, visible_BLT[:, None])

    def write(self, cache: Any, k_BLGK: jax.Array, v_BLGK: jax.Array) -> Any:
        """Returns a layer's keys and values with those of this call written; None without a cache."""
        if cache is None or self.start is None:
            return None
        start = self.start
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(all_BTGK, new_BLGK, start, axis=1)
            for all_BTGK, new_BLGK in zip(cache, (k_BLGK, v_BLGK))
        )


def make_context(
    shape_BL: tuple[int, ...],
    segments_BL: jax.Array | None,
    positions_BL: jax.Array | None,
    cache: Cache | None,
    *,
    packed: bool = False,
) -> AttentionContext:
    """Returns the attention context of a call.

    Args:
      shape_BL: The shape of the tokens.
      segments_BL: 0 (or False) at padding. The tokens of a segment are contiguous and attend to each other. With a
        cache, each row is one segment.
      positions_BL: The positions of the tokens, from 0 after virtual ones. None counts from 0 in each segment, or
        continues from the cache.
      cache: The tokens of earlier calls.
      packed: The cache holds virtual tokens only, and has a slot for each token: segments and positions are those of
        a call without a cache.

    Raises:
      ValueError: The cache has fewer slots than there are tokens.
    """
    length = shape_BL[1]
    if cache is None:
        if positions_BL is None:
            positions_BL = _count_positions(segments_BL, shape_BL)
        return AttentionContext(positions_BL, segments_BL)
    if length > cache.slots:
        raise ValueError(f"{length} tokens, {cache.slots} slots in the cache.")
    mask_BL = jnp.ones(shape_BL, bool) if segments_BL is None else segments_BL.astype(bool)
    if positions_BL is not None:
        positions_BL = positions_BL + cache.virtual
    elif packed:
        positions_BL = _count_positions(segments_BL, shape_BL) + cache.virtual
    else:
        before_B1 = jnp.max(cache.positions_BT, axis=1, keepdims=True) + 1
        positions_BL = jnp.maximum(before_B1 + jnp.cumsum(mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    new_BL = jnp.where(mask_BL, positions_BL, -1)
    slots_BT = jax.lax.dynamic_update_slice_in_dim(cache.positions_BT, new_BL, cache.used, axis=1)
    if segments_BL is not None:
        segments_BL = segments_BL.astype(jnp.int32) if packed else mask_BL.astype(jnp.int32)
    return AttentionContext(positions_BL, segments_BL, slots_BT, cache.used, cache.fresh, packed)


def update_cache(cache: Cache, context: AttentionContext, layers: Any) -> Cache:
    """Returns the cache after a call, from the layers' keys and values and the context of the call."""
    assert context.slots_BT is not None
    return Cache(layers, context.slots_BT, cache.used + context.positions_BL.shape[1], False, cache.virtual)


def _count_positions(segments_BL: jax.Array | None, shape_BL: tuple[int, ...]) -> jax.Array:
    """Counts positions from 0 in each segment."""
    index_BL = jax.lax.broadcasted_iota(jnp.int32, shape_BL, 1)
    if segments_BL is None:
        return index_BL
    segments_BL = segments_BL.astype(jnp.int32)
    begins_BL = jnp.concatenate([jnp.ones((shape_BL[0], 1), bool), segments_BL[:, 1:] != segments_BL[:, :-1]], axis=1)
    return index_BL - jax.lax.cummax(jnp.where(begins_BL, index_BL, 0), axis=1)


__getattr__ = functools.partial(raise_missing, __name__)
