"""Layer normalization, computed in float32 for activations of any dtype."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """Normalizes the last axis to zero mean and unit variance, then scales and shifts; keeps the input's dtype.

    Args:
      width: The size of the last axis.
      epsilon: Added to the variance.
      rngs: Required by the base class, not used.
    """

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        # The error of the fast variance, E[x²] - E[x]², exceeds the difference between frameworks.
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x, mask=mask).astype(x.dtype)
