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
      into: Sizes of the in axes.
      out: Sizes of the out axes, of one part.
    """

    axes: tuple[str, ...]
    blocks: tuple[bool, ...]
    batch: tuple[int, ...]
    into: tuple[int, ...]
    out: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        return math.prod(self.into)

    @property
    def fan_out(self) -> int:
        return math.prod(self.out)

    def of(self, weight: jax.Array) -> jax.Array:
        """`[batch, in, out]`, at least float32."""
        order = [axis for wanted in (BATCH, IN, OUT) for axis, role in enumerate(self.axes) if role == wanted]
        parts = len(self.blocks)
        grouped = jnp.transpose(weight, order).reshape(-1, self.fan_in, parts, self.fan_out)
        kept = jnp.moveaxis(grouped, 2, 1)
        if not all(self.blocks):
            kept = kept[:, np.flatnonzero(self.blocks)]
        return kept.reshape(-1, self.fan_in, self.fan_out).astype(compute_dtype(weight.dtype))
