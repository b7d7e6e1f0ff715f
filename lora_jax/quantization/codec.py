"""The interface of a block code, which a quantized leaf is decoded with."""

import abc
import dataclasses
from typing import ClassVar

import jax


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A code for numbers in [-1, 1], used in blocks that share a scale.

    Args:
      block: The number of weights that share a scale; even.
      double: Whether the scales are quantized too: to eight bits, in blocks of 256, about their mean.

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
    def name(self) -> str:
        """The name of the format, without its options."""
        return type(self).__name__

    @abc.abstractmethod
    def encode(self, values: jax.Array) -> jax.Array:
        """Returns the codes (uint8, below 2 to the power of `bits`) of numbers in [-1, 1]."""

    @abc.abstractmethod
    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns the numbers in [-1, 1] that codes stand for, float32."""
