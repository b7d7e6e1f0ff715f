"""The interface of the formats of quantized weights: a code, and the axes that its blocks run along."""

import dataclasses
from collections.abc import Sequence

import jax

from lora_jax.quantization.codec import Codec
from lora_jax.quantization.leaf import Quantized


@dataclasses.dataclass(frozen=True)
class Format(Codec):
    """A code in blocks along a weight's contracted axes.

    Args:
      axes: The role of each axis of the weight ('batch', 'in', 'out', 'lookup'), overriding the roles found by
        tracing; None uses those.
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
