"""The interface of initializers: the target that they read and the factors that they return."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.leaves import dequantized
from lora_jax.renamed import check_members, former_members, module_getattr

INPUTS, GRADIENT = "inputs", "gradient"
"""The statistics of the data that an initializer may read: of the weight's inputs, or the gradient of a loss."""


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
        """The inputs of each of `times` blocks, which share those of their batch element."""
        return self if times == 1 else jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The statistics of the data for one weight; None for those that no initializer reads.

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
class Target:
    """The weight that an initializer makes factors for; its batch, in and out axes are flattened to one each.

    Attributes:
      key: A PRNG key.
      batch: The number of matrices (layers, experts, blocks).
      rank: Of the factors.
      fan_in: The size of the in axes.
      fan_out: The size of the out axes.
      lookup: Whether the weight is indexed, not contracted.
      scale: The factor of the product.
      leaf: The weight in the base, an array or quantized.
      axes: The role of each of its axes.
      matrices: Reshapes an array of the shape of `leaf` to `[batch, in, out]`, at least float32.
      residual: `leaf` minus scale·aᵀb, for factors a and b.
      inputs: The moments of the inputs of each matrix; None unless the initializer reads them.
      gradient: `[batch, in, out]`, float32; None unless the initializer reads it.
      ranks: Of each matrix, if :meth:`Initializer.allocate_ranks` chose them: later rows of its factors are zero.
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
    residual: Callable[[jax.Array, jax.Array], jax.Array]
    inputs: Inputs | None = None
    gradient: jax.Array | None = None
    ranks: tuple[int, ...] | None = None

    @property
    def weight(self) -> jax.Array:
        """`[batch, in, out]`, at least float32."""
        return self.matrices(dequantized(self.leaf))


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors that training starts from.

    Attributes:
      a: `[batch, rank, in]`.
      b: `[batch, rank, out]`.
      leaf: Replaces the weight in the base; None leaves the weight unchanged.
    """

    a: jax.Array
    b: jax.Array
    leaf: Any = None


@former_members(start="make_factors", distributed="allocate_ranks")
class Initializer:
    """Initializes the factors of a low-rank term. Subclasses are frozen dataclasses.

    Attributes:
      moves_weight: Whether a part of the weight moves into the factors, so that the base changes. A quantized base is
        quantized again without that part, so the initial outputs change by the rounding error of the remaining weight.
      reads: The statistics of the data that it reads, :data:`INPUTS` or :data:`GRADIENT`; None for none.
    """

    moves_weight: ClassVar[bool] = False
    reads: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        check_members(cls)

    def make_factors(self, target: Target) -> Factors:
        """Returns the factors for one weight, and the weight if it changes."""
        raise TypeError(f"{type(self).__name__} makes no factors: define make_factors().")

    def allocate_ranks(
        self, rank: int, statistics: Mapping[str, Statistics], limits: Mapping[str, int], blocks: int
    ) -> dict[str, tuple[int, ...]] | None:
        """Returns the rank of each matrix of each path, or None if all have the recipe's.

        Args:
          rank: The recipe's.
          statistics: By path, those of the data.
          limits: By path, the largest rank that its matrices can have.
          blocks: The number of matrices that each batch element is split into.
        """
        del rank, statistics, limits, blocks
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated(Initializer):
    """An initializer with the statistics of the data for one weight.

    Attributes:
      initializer: The initializer.
      statistics: In the weight's layout; they are reshaped for each matrix when its factors are made, one weight at a
        time.
      ranks: Of each matrix, or None.
    """

    initializer: Initializer
    statistics: Statistics = dataclasses.field(repr=False)
    ranks: tuple[int, ...] | None

    @property
    def moves_weight(self) -> bool:  # pyrefly: ignore[bad-override]
        return self.initializer.moves_weight

    def make_factors(self, target: Target) -> Factors:
        inputs, gradient = self.statistics.inputs, self.statistics.gradient
        if inputs is not None:
            inputs = inputs.repeated(target.batch // inputs.count.shape[0])
        if gradient is not None:
            gradient = target.matrices(gradient)
        return self.initializer.make_factors(
            dataclasses.replace(target, inputs=inputs, gradient=gradient, ranks=self.ranks)
        )


__getattr__ = module_getattr(__name__, Given="Target", Informed="Calibrated", Reading="Statistics", Start="Factors")
