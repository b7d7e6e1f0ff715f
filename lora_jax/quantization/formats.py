"""The formats of quantized weights: what a code of a block stands for, and how many bits it has."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from lora_jax.quantization import codebooks
from lora_jax.quantization.leaf import Quantized


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """Blocks along a weight's contracted axes, each with a scale: the largest magnitude in it.

    Args:
      block: How many weights share a scale; even.
      double: Whether the scales are quantized too: to eight bits, in blocks of 256, about their mean.
      axes: The role of each axis of the weight ('batch', 'in', 'out', 'lookup'), where tracing should not decide
        them; None lets it.

    Attributes:
      bits: Of a code.
    """

    block: int = 64
    double: bool = True
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None

    bits: ClassVar[int]

    def __post_init__(self):
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise ValueError(f"{self.name}(block={self.block!r}): a block is a positive even number of weights.")
        if not isinstance(self.double, bool):
            raise ValueError(f"{self.name}(double={self.double!r}): True or False.")

    @property
    def name(self) -> str:
        """Of the format, without its options."""
        return type(self).__name__

    def quantize(self, weight: jax.Array, axes: Sequence[str]) -> Quantized:
        """The quantized form of an array.

        Args:
          weight: Floats.
          axes: The role of each axis; see :func:`blocked_axes`.
        """
        return Quantized.of(weight, dataclasses.replace(self, axes=None), *blocked_axes(axes))

    @abc.abstractmethod
    def encode(self, values: jax.Array) -> jax.Array:
        """Codes (uint8, below 2 to the power of `bits`) of numbers in [-1, 1]."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """The numbers in [-1, 1] that codes stand for, float32."""


def blocked_axes(axes: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """The axes that blocks run along, as negative numbers, and how many leading axes are layers.

    Blocks run along the in axes; along the out axes where 'lookup' says that rows are taken.
    """
    wanted = "out" if "lookup" in axes else "in"
    blocked = tuple(axis - len(axes) for axis, role in enumerate(axes) if role == wanted)
    layers = next((axis for axis, role in enumerate(axes) if role != "batch"), len(axes))
    return blocked, layers


class _Levels(Format):
    """Sixteen numbers."""

    bits = 4
    levels: ClassVar[tuple[float, ...]]

    def encode(self, values: jax.Array) -> jax.Array:
        return codebooks.nearest(values, self.levels)

    def decode(self, codes: jax.Array) -> jax.Array:
        return codebooks.chosen(codes, self.levels)


@dataclasses.dataclass(frozen=True)
class NF4(_Levels):
    """Four bits: sixteen quantiles of a normal distribution. With double quantization 4.127 bits a weight.

    Takes what :class:`Format` takes.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jax.random.normal(jax.random.key(0), (128, 64))}
      >>> made = lora.quantize(base, {"w": NF4(axes=("in", "out"))})["w"]
      >>> made.shape, made.codes.shape, made.codes.dtype.name
      ((128, 64), (64, 64), 'uint8')

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, §3
    """

    levels = codebooks.NORMAL_FLOAT


@dataclasses.dataclass(frozen=True)
class FP4(_Levels):
    """Four bits: a sign, two of exponent, one of fraction; bitsandbytes' values.

    Takes what :class:`Format` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> FP4().decode(jnp.asarray([3, 5, 11], jnp.uint8)).tolist()
      [1.0, 0.5, -1.0]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    levels = codebooks.FLOAT


class _Integers(Format):
    """Equal steps on both sides of zero."""

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, values: jax.Array) -> jax.Array:
        steps = jnp.round(values * self._largest)
        # Of NaN, which a cast would make any number, the code of zero; the scale keeps the NaN.
        return (jnp.where(jnp.isnan(steps), 0.0, steps) + 2 ** (self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes: jax.Array) -> jax.Array:
        return (codes.astype(jnp.float32) - 2 ** (self.bits - 1)) / self._largest


@dataclasses.dataclass(frozen=True)
class Int8(_Integers):
    """Eight bits: the integers from -127 to 127.

    Takes what :class:`Format` takes.

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

    Takes what :class:`Format` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> Int4().encode(jnp.asarray([-1.0, 0.0, 0.5])).tolist()
      [1, 8, 12]

    References:
      Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, table 2
    """

    bits = 4
