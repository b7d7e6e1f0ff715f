"""Formats in which a block has a scale, the largest magnitude in it: codes stand for numbers in [-1, 1]."""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.quantization import codebooks
from lora_jax.quantization.formats import Format
from lora_jax.quantization.scales import normalize


@dataclasses.dataclass(frozen=True)
class AbsmaxFormat(Format):
    """Blocks along a weight's contracted axes, each with a scale: the largest magnitude in it.

    With four bits, byte j of a block holds weight j in its upper half and weight j + block/2 in its lower half.

    Args:
      block: The number of weights that share a scale; even.
      double: Whether the scales are quantized too: to eight bits, in blocks of 256, about their mean.
      axes: The role of each axis of the weight ('batch', 'in', 'out', 'lookup'), overriding the roles found by
        tracing; None uses those.

    Attributes:
      bits: The size of a code, 4 or 8.
    """

    block: int = 64
    double: bool = True

    bits: ClassVar[int]

    def __post_init__(self):
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise ValueError(f"{self.name}(block={self.block!r}): expected a positive even number of weights.")
        if not isinstance(self.double, bool):
            raise ValueError(f"{self.name}(double={self.double!r}): expected True or False.")

    @property
    def block_bytes(self) -> int:
        return self.block * self.bits // 8

    def with_float_scales(self) -> "AbsmaxFormat":
        return dataclasses.replace(self, double=False)

    @abc.abstractmethod
    def encode(self, values: jax.Array) -> jax.Array:
        """Returns the codes (uint8, below 2 to the power of `bits`) of numbers in [-1, 1]."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns the numbers in [-1, 1] that codes stand for, float32."""

    def encode_blocks(self, values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array | None]:
        largest = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
        # XLA's maximum over some axes drops NaN. A block that contains NaN gets a NaN scale.
        largest = jnp.where(jnp.isnan(values).any(axis=axis, keepdims=True), jnp.nan, largest)
        codes = self.encode(normalize(values, largest))
        if self.bits == 4:
            upper, lower = jnp.split(codes, 2, axis=axis)
            codes = jnp.left_shift(upper, jnp.uint8(4)) | lower
        return codes, jnp.squeeze(largest, axis)

    def decode_blocks(self, codes: jax.Array, scales: jax.Array | None, axis: int) -> jax.Array:
        assert scales is not None
        if self.bits == 4:
            codes = jnp.expand_dims(codes, axis)
            shifts = jnp.asarray([4, 0], jnp.uint8).reshape(*(1,) * axis, 2, *(1,) * (codes.ndim - axis - 1))
            codes = jnp.right_shift(codes, shifts) & jnp.uint8(15)
        inner = range(axis, axis + codes.ndim - scales.ndim)
        return self.decode(codes) * jnp.expand_dims(scales, tuple(inner))


class _Levels(AbsmaxFormat):
    """A code of sixteen levels."""

    bits = 4
    levels: ClassVar[tuple[float, ...]]

    def encode(self, values: jax.Array) -> jax.Array:
        return codebooks.nearest(values, self.levels)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codebooks.lookup(codes, self.levels)


@dataclasses.dataclass(frozen=True)
class NF4(_Levels):
    """Four bits: sixteen quantiles of a normal distribution. With double quantization 4.127 bits a weight.

    Takes the arguments of :class:`AbsmaxFormat`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> leaf = lora.quantize(base, {"w": NF4(axes=("in", "out"))})["w"]
      >>> leaf.shape, leaf.codes.shape, leaf.codes.dtype.name
      ((128, 64), (64, 64), 'uint8')

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3
    """

    levels = codebooks.NORMAL_FLOAT


@dataclasses.dataclass(frozen=True)
class FP4(_Levels):
    """Four bits: a sign, two of exponent, one of fraction; bitsandbytes' values.

    Takes the arguments of :class:`AbsmaxFormat`.

    Example:
      >>> import jax.numpy as jnp
      >>> FP4().decode(jnp.asarray([3, 5, 11], jnp.uint8)).tolist()
      [1.0, 0.5, -1.0]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    levels = codebooks.FLOAT


class _Integers(AbsmaxFormat):
    """A code of equal steps on both sides of zero."""

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: jax.Array) -> jax.Array:
        steps = jnp.round(values * self._largest)
        # NaN gets the code of zero, because its cast is undefined; the scale of its block is NaN.
        return (jnp.where(jnp.isnan(steps), 0.0, steps) + 2 ** (self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(jnp.float32) - 2 ** (self.bits - 1)) / self._largest


@dataclasses.dataclass(frozen=True)
class Int8(_Integers):
    """Eight bits: the integers from -127 to 127.

    Takes the arguments of :class:`AbsmaxFormat`.

    Example:
      >>> import jax.numpy as jnp
      >>> Int8().encode(jnp.asarray([-1.0, 0.0, 0.5])).tolist()
      [1, 128, 192]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §2
    """

    bits = 8


@dataclasses.dataclass(frozen=True)
class Int4(_Integers):
    """Four bits: the integers from -7 to 7.

    Takes the arguments of :class:`AbsmaxFormat`.

    Example:
      >>> import jax.numpy as jnp
      >>> Int4().encode(jnp.asarray([-1.0, 0.0, 0.5])).tolist()
      [1, 8, 12]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    bits = 4
