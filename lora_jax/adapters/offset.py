"""A trained, scaled term beside a leaf: the bias that some LoRA variants add to their second product."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.leaves import align_leading
from lora_jax.renamed import module_getattr


@adapter("Offset")
class OffsetAdapter(Adapter):
    """w + scale · value.

    Attributes:
      value: An array of the leaf's shape.
      scale: Scalar, or of the shape of the leaf's leading axes.
      axes: Empty: no role is needed.
    """

    value: jax.Array = trained("weight")
    scale: jax.Array = frozen("weight", leading=True)
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True
    merged_because = "an offset is as large as its leaf"

    def merge(self, weight: jax.Array) -> jax.Array:
        dtype = compute_dtype(weight.dtype)
        scale = align_leading(self.scale.astype(dtype), self.value.ndim)
        return (weight.astype(dtype) + scale * self.value.astype(dtype)).astype(weight.dtype)

    def describe(self) -> dict[str, Any]:
        return {"scale": float(self.scale)} if isinstance(self.scale, jax.Array) and self.scale.ndim == 0 else {}


@dataclasses.dataclass(frozen=True)
class Offset(Recipe):
    """Trains a term that is added to a leaf, starting from zero.

    On the bias of a layer, with the scale of the LoRA on its kernel, it is the bias on the second factor
    that PEFT calls `lora_bias`: s·(B·A·x + o) + b.

    Args:
      scale: Multiplies the term.
      dtype: The dtype of the term.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> Offset(scale=2.0).create(jax.random.key(0), jnp.ones(3), ()).merge(jnp.ones(3)).tolist()
      [1.0, 1.0, 1.0]
    """

    scale: float = 1.0
    dtype: jax.typing.DTypeLike = jnp.float32

    needs_axes = False

    def __post_init__(self):
        checks.finite("Offset", "scale", self.scale, nonzero=True)
        checks.floating("Offset", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> OffsetAdapter:
        del key, axes
        return OffsetAdapter(
            value=jnp.zeros(weight.shape, self.dtype), scale=jnp.asarray(self.scale, jnp.float32), axes=()
        )


__getattr__ = module_getattr(__name__, Addition="OffsetAdapter")
