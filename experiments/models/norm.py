"""Layer normalization, computed in float32 whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """Zero mean and unit variance along the last axis, then a scale and a bias; the input's dtype comes out.

    Args:
      width: Of the last axis.
      epsilon: Added to the variance.
      rngs: Asked for by the base class, not used.
    """

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        # The fast variance, E[x²] - E[x]², cancels: its error alone exceeds the difference between frameworks.
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x, mask=mask).astype(x.dtype)
