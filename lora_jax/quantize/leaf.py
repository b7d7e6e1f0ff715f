"""A quantised weight: codes and scales in place of floats."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quantize import codebooks

if TYPE_CHECKING:  # formats make leaves
    from lora_jax.quantize.formats import Format

SECOND_BLOCK = 256
"""How many scales share a scale of the second level."""

_HUGE = 2.0**120
"""Above it the reciprocal of a float32 is no normal number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scales:
    """The scales of a weight's blocks in eight bits.

    Those of a layer stand in the order of its outputs, of each output all, and so make blocks of 256.

    Attributes:
      codes: `[*layers, …]`, uint8, in the place of the scales.
      second: `[*layers, n/256]`, float32; a scale for each block of scales.
      offset: `[*layers]`, float32; the mean of the layer's scales.
    """

    codes: jax.Array
    second: jax.Array
    offset: jax.Array

    @classmethod
    def of(cls, scales: jax.Array, layers: int, place: int) -> "Scales":
        """Quantises scales.

        Args:
          scales: float32, one for each block.
          layers: How many leading axes run over layers.
          place: The axis along which one output's scales lie, as a negative number.
        """
        offset = jnp.mean(scales, axis=tuple(range(layers, scales.ndim)))
        centred = scales - offset.reshape(*offset.shape, *(1,) * (scales.ndim - layers))
        ordered = jnp.moveaxis(centred, place, -1)
        values = ordered.reshape(*offset.shape, -1)
        number = -(-values.shape[-1] // SECOND_BLOCK)
        padding = number * SECOND_BLOCK - values.shape[-1]
        blocks = jnp.pad(values, [*((0, 0),) * layers, (0, padding)]).reshape(*offset.shape, number, SECOND_BLOCK)
        second = jnp.max(jnp.abs(blocks), axis=-1)
        codes = codebooks.nearest(_divided(blocks, second[..., None]), codebooks.dynamic_map())
        codes = codes.reshape(*offset.shape, -1)[..., : values.shape[-1]].reshape(ordered.shape)
        return cls(codes=jnp.moveaxis(codes, -1, place), second=second, offset=offset)

    def decoded(self, place: int) -> jax.Array:
        """The scales, float32; `place` as for :meth:`of`."""
        ordered = list(self.codes.shape[self.offset.ndim :])
        ordered.append(ordered.pop(place))
        spread = jnp.repeat(self.second, SECOND_BLOCK, axis=-1)[..., : math.prod(ordered)]
        spread = jnp.moveaxis(spread.reshape(*self.offset.shape, *ordered), -1, place)
        values = jnp.take(codebooks.dynamic_map(), self.codes.astype(jnp.int32), mode="clip")
        return values * spread + self.offset.reshape(*self.offset.shape, *(1,) * len(ordered))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Quantized:
    """A weight as codes, and a scale for each block of them.

    The blocked axes of the weight (those that are contracted, as a rule) are one axis of `codes`, in the place of the
    first of them. All other axes are what they are in the weight, and batch axes that lead (layers, experts) lead in
    every array, which is why slicing, stacking, scanning and sharding along them act on all arrays alike. Axes are
    counted from the end, so that this stands where leading axes come or go.

    Attributes:
      codes: uint8. Along the blocked axis n weights take n bytes, or n/2 where a code has four bits: byte j of a block
        holds weight j in its upper half and weight j + block/2 in its lower half.
      scales: float32, or :class:`Scales`; along the blocked axis one for each block.
      format: What the codes stand for.
      blocked: The weight's axes that blocks run along, as negative numbers, in order.
      sizes: Their sizes. The last block is padded where they are no multiple of it.
      dtype: Of the weight.
    """

    codes: jax.Array
    scales: jax.Array | Scales
    format: "Format" = dataclasses.field(metadata={"static": True})
    blocked: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, weight: jax.Array, form: "Format", blocked: Sequence[int], layers: int) -> "Quantized":
        """Quantises an array.

        Args:
          weight: Floats.
          form: The format.
          blocked: The axes that blocks run along, as negative numbers, in order.
          layers: How many leading axes have scales of the second level of their own.
        """
        block, sizes = form.block, tuple(weight.shape[axis] for axis in blocked)
        at = blocked[0] + weight.ndim
        # The blocked axes side by side, in the place of the first of them, then as one.
        values = jnp.moveaxis(weight.astype(jnp.float32), tuple(blocked), tuple(range(at, at + len(sizes))))
        lead, tail = values.shape[:at], values.shape[at + len(sizes) :]
        number = -(-math.prod(sizes) // block)
        padding = number * block - math.prod(sizes)
        values = values.reshape(*lead, math.prod(sizes), *tail)
        if padding:
            values = jnp.pad(values, [(0, padding if axis == at else 0) for axis in range(values.ndim)])
        values = values.reshape(*lead, number, block, *tail)
        largest = jnp.max(jnp.abs(values), axis=at + 1, keepdims=True)
        codes = form.encode(_divided(values, largest))
        if form.bits == 4:
            upper, lower = jnp.split(codes, 2, axis=at + 1)
            codes = jnp.left_shift(upper, jnp.uint8(4)) | lower
        scales = jnp.squeeze(largest, at + 1)
        return cls(
            codes=codes.reshape(*lead, codes.shape[at] * codes.shape[at + 1], *tail),
            scales=Scales.of(scales, layers, at - scales.ndim) if form.double else scales,
            format=form,
            blocked=tuple(blocked),
            sizes=sizes,
            dtype=np.dtype(weight.dtype),
        )

    def requantized(self, weight: jax.Array) -> "Quantized":
        """Another weight of the same shape, quantised as this one is and placed where it is."""
        made = Quantized.of(weight.astype(self.dtype), self.format, self.blocked, self.layers)

        def place(new: jax.Array, old: jax.Array) -> jax.Array:
            known = isinstance(old, jax.Array) and not isinstance(new, jax.core.Tracer)
            return jax.device_put(new, old.sharding) if known and new.sharding != old.sharding else new

        return jax.tree.map(place, made, self)

    @property
    def place(self) -> int:
        """The blocked axis of `codes` and scales, as a negative number."""
        return self.blocked[0] + len(self.blocked) - 1

    @property
    def layers(self) -> int:
        """How many leading axes all arrays have in common."""
        if isinstance(self.scales, Scales):
            return len(self.scales.offset.shape)
        return len(self.codes.shape) + self.place

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        rest = [size for axis, size in enumerate(self.codes.shape, -len(self.codes.shape)) if axis != self.place]
        order = [axis for axis in range(-len(rest) - len(self.blocked), 0) if axis not in self.blocked]
        sizes = dict(zip(order, rest)) | dict(zip(self.blocked, self._block_sizes()))
        return tuple(sizes[axis] for axis in sorted(sizes))

    def _block_sizes(self) -> tuple[int, ...]:
        """The sizes of the blocked axes here: of one shard, the first of them is a part."""
        stored = self.codes.shape[self.place] * (2 if self.format.bits == 4 else 1)
        whole = math.prod(self.sizes)
        if stored == _padded(whole, self.format.block):
            return self.sizes
        return (stored // math.prod(self.sizes[1:]), *self.sizes[1:])

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.codes.shape) + len(self.blocked) - 1

    @property
    def size(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What codes and scales take."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits(self) -> float:
        """Bits for each weight, scales and padding included."""
        return 8.0 * self.nbytes / self.size

    def __repr__(self) -> str:
        if not hasattr(self.codes, "shape"):  # a mask, or one half of a partition
            return f"Quantized({self.codes!r}, {self.scales!r}, {self.format.name})"
        double = ", double" if isinstance(self.scales, Scales) else ""
        sizes = ", ".join(map(str, self.shape))
        return (
            f"{self.format.name}[{sizes}](dtype={np.dtype(self.dtype).name}, block={self.format.block}{double}, "
            f"{self.bits:.3f} bits)"
        )

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """For `np.asarray`: the weight, dequantised."""
        del copy
        return np.asarray(self.dequantize(), dtype)

    def dequantize(self) -> jax.Array:
        """The weight, of `shape` and `dtype`; computed in float32.

        Raises:
          ValueError: The arrays do not fit each other: they are of different weights, or cut.
        """
        self._check()
        block, half = self.format.block, self.format.block // 2
        scales = self._first_level()
        at = scales.ndim + self.place
        lead, tail = self.codes.shape[:at], self.codes.shape[at + 1 :]
        number = scales.shape[at]
        if self.format.bits == 4:
            codes = self.codes.reshape(*lead, number, 1, half, *tail)
            shifts = jnp.asarray([4, 0], jnp.uint8).reshape(*(1,) * (at + 1), 2, *(1,) * (1 + len(tail)))
            codes = (jnp.right_shift(codes, shifts) & jnp.uint8(15)).reshape(*lead, number, block, *tail)
        else:
            codes = self.codes.reshape(*lead, number, block, *tail)
        values = self.format.decode(codes) * jnp.expand_dims(scales, at + 1)
        values = values.reshape(*lead, number * block, *tail).astype(self.dtype)
        sizes = self._block_sizes()
        total = math.prod(sizes)
        if total != number * block:
            values = jax.lax.slice_in_dim(values, 0, total, axis=at)
        values = values.reshape(*lead, *sizes, *tail)
        together = range(at, at + len(sizes))
        return jnp.moveaxis(values, tuple(together), tuple(axis + values.ndim for axis in self.blocked))

    def first_level(self) -> "Quantized":
        """The same weight with scales in float32: what a part of it needs no more than its own part of."""
        if not isinstance(self.scales, Scales):
            return self
        return dataclasses.replace(
            self, scales=self._first_level(), format=dataclasses.replace(self.format, double=False)
        )

    def _first_level(self) -> jax.Array:
        """The scales in float32."""
        return self.scales.decoded(self.place) if isinstance(self.scales, Scales) else self.scales

    def _check(self) -> None:
        scales = self.scales.codes if isinstance(self.scales, Scales) else self.scales
        stored = self.codes.shape[self.place] * (2 if self.format.bits == 4 else 1)
        expected = list(self.codes.shape)
        expected[self.place] = -(-stored // self.format.block)
        second = None
        if isinstance(self.scales, Scales):
            inner = math.prod(scales.shape[len(self.scales.offset.shape) :])
            second = (*self.scales.offset.shape, -(-inner // SECOND_BLOCK))
        if (
            tuple(scales.shape) != tuple(expected)
            or stored % self.format.block
            or (second is not None and tuple(self.scales.second.shape) != second)  # pyrefly: ignore
        ):
            parts = {
                "codes": self.codes.shape,
                "scales": scales.shape,
                **({"second": self.scales.second.shape} if isinstance(self.scales, Scales) else {}),
            }
            raise ValueError(
                f"A quantised weight in {self.format} whose arrays do not fit each other: "
                f"{', '.join(f'{name} {tuple(shape)}' for name, shape in parts.items())}; for these codes scales are "
                f"{tuple(expected)}{'' if second is None else f' and second {second}'}."
            )


def _divided(values: jax.Array, largest: jax.Array) -> jax.Array:
    """Values over the largest magnitude of their block; zeros where that is zero."""
    safe = jnp.where(largest == 0.0, 1.0, largest)
    # By the reciprocal, as bitsandbytes does: its rounding decides the code of a value in the middle of two.
    return jnp.clip(jnp.where(safe < _HUGE, values * (1.0 / safe), values / safe), -1.0, 1.0)


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
