"""What an initializer is, what it may read, and what it gives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.leaves import dequantized

INPUTS, GRADIENT = "inputs", "gradient"
"""What an initializer may read of the data: the inputs of the weight, the gradient of a loss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """The moments of a weight's inputs, over all tokens of all batches and all uses. float32.

    Attributes:
      squares: `[batch, in, in]`, Σ x·xᵀ.
      total: `[batch, in]`, Σ x.
      count: `[batch]`, how many.
    """

    squares: jax.Array
    total: jax.Array
    count: jax.Array

    def covariance(self) -> jax.Array:
        """`[batch, in, in]`, about the mean; zero where there was no input."""
        count = jnp.maximum(self.count, 1.0)[:, None, None]
        mean = self.total[:, :, None] / count
        return self.squares / count - mean * jnp.swapaxes(mean, 1, 2)

    def repeated(self, times: int) -> "Inputs":
        """The inputs of each of so many blocks, which have in common those of their batch element."""
        return self if times == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the data told of a weight; None for what was not asked for.

    Attributes:
      shape: Of the weight.
      axes: The role of each of its axes.
      inputs: The moments of its inputs.
      gradient: The mean over the batches of the loss's gradient, float32, of the shape of the weight.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    inputs: Inputs | None = None
    gradient: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What an initializer makes factors from; batch, in and out axes are flattened to one each.

    Attributes:
      key: A PRNG key.
      batch: The number of matrices (layers, experts, blocks).
      rank: Of the factors.
      fan_in: The size of the in axes.
      fan_out: The size of the out axes.
      lookup: Whether the weight is indexed, not contracted.
      scale: What multiplies the product of the factors.
      leaf: The weight as the base has it, an array or quantized.
      axes: The role of each of its axes.
      matrices: Makes `[batch, in, out]`, at least float32, of an array of the shape of `leaf`.
      without: `leaf` without scale·aᵀb, for factors a and b.
      inputs: The moments of the inputs of each matrix; None unless the initializer reads them.
      gradient: `[batch, in, out]`, float32; None unless the initializer reads it.
      ranks: Of each matrix, where ranks were distributed: rows of its factors after these are zero.
    """

    key: jax.Array
    batch: int
    rank: int
    fan_in: int
    fan_out: int
    lookup: bool
    scale: float
    leaf: Any
    axes: tuple[str, ...]
    matrices: Callable[[jax.Array], jax.Array]
    without: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: Inputs | None = None
    gradient: jax.Array | None = None
    ranks: tuple[int, ...] | None = None

    @property
    def weight(self) -> jax.Array:
        """`[batch, in, out]`, at least float32."""
        return self.matrices(dequantized(self.leaf))


@dataclasses.dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
      a: `[batch, rank, in]`.
      b: `[batch, rank, out]`.
      leaf: Takes the weight's place in the base; None leaves the weight as it is.
    """

    a: jax.Array
    b: jax.Array
    leaf: Any = None


class Initializer:
    """A way to start the factors of a low-rank term. Subclasses are frozen dataclasses.

    Attributes:
      moves_weight: Whether a part of the weight moves into the factors, so that the base changes.
      reads: What it reads of the data, :data:`INPUTS` or :data:`GRADIENT`; None for nothing.
    """

    moves_weight: ClassVar[bool] = False
    reads: ClassVar[str | None] = None

    def start(self, given: Given) -> Start:
        """The factors for one weight, and the weight where it changes."""
        raise TypeError(f"{type(self).__name__} starts no factors: define start().")

    def distributed(
        self, rank: int, readings: Mapping[str, Reading], limits: Mapping[str, int], blocks: int
    ) -> dict[str, tuple[int, ...]] | None:
        """The rank of each matrix of each path, or None where each gets the recipe's.

        Args:
          rank: The recipe's.
          readings: By path, what was read.
          limits: By path, the largest rank that its matrices can have.
          blocks: How many matrices each batch element is split into.
        """
        del rank, readings, limits, blocks
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated(Initializer):
    """An initializer with what it read of one weight.

    Attributes:
      initializer: The initializer.
      reading: As it was read; it is laid out for each matrix when the factors are made, one weight at a time.
      ranks: Of each matrix, or None.
    """

    initializer: Initializer
    reading: Reading = dataclasses.field(repr=False)
    ranks: tuple[int, ...] | None

    @property
    def moves_weight(self) -> bool:  # pyrefly: ignore[bad-override]
        return self.initializer.moves_weight

    def start(self, given: Given) -> Start:
        inputs, gradient = self.reading.inputs, self.reading.gradient
        if inputs is not None:
            inputs = inputs.repeated(given.batch // inputs.count.shape[0])
        if gradient is not None:
            gradient = given.matrices(gradient)
        return self.initializer.start(dataclasses.replace(given, inputs=inputs, gradient=gradient, ranks=self.ranks))
