"""The formats of quantized weights: the numbers that codes stand for, and the bits of a code."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.quantization import codebooks
from lora_jax.quantization.codec import Codec
from lora_jax.quantization.leaf import Quantized


@dataclasses.dataclass(frozen=True)
class Format(Codec):
    """Blocks along a weight's contracted axes, each with a scale: the largest magnitude in it.

    Args:
      block: The number of weights that share a scale; even.
      double: Whether the scales are quantized too: to eight bits, in blocks of 256, about their mean.
      axes: The role of each axis of the weight ('batch', 'in', 'out', 'lookup'), overriding the roles found by
        tracing; None uses those.

    Attributes:
      bits: The size of a code, 4 or 8.
    """

    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None

    def quantize(self, weight: jax.Array, axes: Sequence[str]) -> Quantized:
        """Quantizes an array.

        Args:
          weight: Floats.
          axes: The role of each axis; see :func:`blocked_axes`.
        """
        return Quantized.of(weight, dataclasses.replace(self, axes=None), *blocked_axes(axes))


def blocked_axes(axes: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Returns the axes that blocks run along, as negative numbers, and the number of leading batch axes.

    Blocks run along the in axes, or along the out axes of a lookup table.
    """
    block_role = "out" if "lookup" in axes else "in"
    blocked = tuple(axis - len(axes) for axis, role in enumerate(axes) if role == block_role)
    layers = next((axis for axis, role in enumerate(axes) if role != "batch"), len(axes))
    return blocked, layers


class _Levels(Format):
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

    Takes the arguments of :class:`Format`.

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

    Takes the arguments of :class:`Format`.

    Example:
      >>> import jax.numpy as jnp
      >>> FP4().decode(jnp.asarray([3, 5, 11], jnp.uint8)).tolist()
      [1.0, 0.5, -1.0]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    levels = codebooks.FLOAT


class _Integers(Format):
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

    Takes the arguments of :class:`Format`.

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

    Takes the arguments of :class:`Format`.

    Example:
      >>> import jax.numpy as jnp
      >>> Int4().encode(jnp.asarray([-1.0, 0.0, 0.5])).tolist()
      [1, 8, 12]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    bits = 4
