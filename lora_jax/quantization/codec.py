"""The interface of a block code, which a quantized leaf is decoded with."""

import abc
import dataclasses
from typing import ClassVar

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """A code for weights in blocks.

    Methods take `[*lead, blocks, size, *tail]` and the position of `size`, the weights or the bytes of a block.

    Attributes:
      largest: The largest magnitude of a weight that can be encoded.
      is_read_only: Whether weights are only read in this code, and not encoded.
    """

    largest: ClassVar[float] = float(np.finfo(np.float32).max)
    is_read_only: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name of the format, without its options."""
        return type(self).__name__

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """The number of weights in a block."""

    @property
    def double(self) -> bool:
        """Whether the scales beside the codes are quantized too."""
        return False

    @property
    @abc.abstractmethod
    def block_bytes(self) -> int:
        """The number of bytes of codes in a block."""

    def with_float_scales(self) -> "Codec":
        """Returns the code with scales that are not quantized."""
        return self

    def check_encodable(self) -> None:
        """Raises `ValueError` if weights are only read in this code."""
        if self.is_read_only:
            raise ValueError(
                f"{self.name} is read from files only; weights cannot be quantized into it. Formats to quantize into "
                "are NF4, FP4, Int8, Int4, Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0."
            )

    @abc.abstractmethod
    def encode_blocks(self, values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array | None]:
        """Encodes blocks.

        Args:
          values: `[*lead, blocks, block, *tail]`, float32.
          axis: The position of `block`.

        Returns:
          Codes, `[*lead, blocks, block_bytes, *tail]`, uint8; and a scale for each block, `[*lead, blocks, *tail]`,
          float32, or None if the codes contain the scales.

        Raises:
          ValueError: Weights are only read in this code.
        """

    @abc.abstractmethod
    def decode_blocks(self, codes: jax.Array, scales: jax.Array | None, axis: int) -> jax.Array:
        """Decodes blocks, the inverse of :meth:`encode_blocks`.

        Returns:
          float32. The weights of a block, in their order, may have several axes in place of one.
        """
