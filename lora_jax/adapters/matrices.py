"""A weight of any axes as matrices, which is how initializers see it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.protocol import BATCH, IN, OUT


@dataclasses.dataclass(frozen=True)
class Matrices:
    """A weight as matrices, one for each batch element and adapted block.

    Attributes:
      axes: The role of each axis of the weight: 'batch', 'in' or 'out'.
      blocks: Which of the equal parts of the out axis are adapted.
      batch: Sizes of the batch axes, and the number of adapted blocks where there are several parts.
      in_sizes: Sizes of the in axes.
      out_sizes: Sizes of the out axes, of one part.
    """

    axes: tuple[str, ...]
    blocks: tuple[bool, ...]
    batch: tuple[int, ...]
    in_sizes: tuple[int, ...]
    out_sizes: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        return math.prod(self.in_sizes)

    @property
    def fan_out(self) -> int:
        return math.prod(self.out_sizes)

    def from_weight(self, weight: jax.Array) -> jax.Array:
        """`[batch, in, out]`, at least float32."""
        order = sorted(range(len(self.axes)), key=lambda axis: (BATCH, IN, OUT).index(self.axes[axis]))
        parts = len(self.blocks)
        grouped = jnp.transpose(weight, order).reshape(-1, self.fan_in, parts, self.fan_out)
        matrices = jnp.moveaxis(grouped, 2, 1)
        if not all(self.blocks):
            matrices = matrices[:, np.flatnonzero(self.blocks)]
        return matrices.reshape(-1, self.fan_in, self.fan_out).astype(compute_dtype(weight.dtype))
