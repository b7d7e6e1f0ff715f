"""Factors drawn at random, whose product is zero: training starts from the base function."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.initializers.initializer import Factors, Initializer, Target

Draw = Callable[[jax.Array, int, int, int, int], tuple[jax.Array, jax.Array]]
"""(key, batch, rank, fan_in, fan_out) -> a `[batch, rank, fan_in]`, b `[batch, rank, fan_out]`, float32."""


@dataclasses.dataclass(frozen=True)
class Drawn(Initializer):
    """Factors drawn from a key and sizes.

    Args:
      draw: (key, batch, rank, fan_in, fan_out) -> a, b.
      lookup: Likewise, for a weight that is indexed; `draw` where None.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> def ones(key, batch, rank, fan_in, fan_out):
      ...     return jnp.ones((batch, rank, fan_in)), jnp.zeros((batch, rank, fan_out))
      >>> recipe = lora.LoRA(1, init=Drawn(ones), axes=("in", "out"))
      >>> lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": recipe})["w"].a.tolist()
      [[1.0, 1.0, 1.0, 1.0]]
    """

    draw: Draw
    lookup: Draw | None = None

    def make_factors(self, target: Target) -> Factors:
        draw = self.lookup if target.lookup and self.lookup is not None else self.draw
        return Factors(*draw(target.key, target.batch, target.rank, target.fan_in, target.fan_out))


def kaiming_uniform(key, batch, rank, fan_in, fan_out):
    """a ~ U(±1/√fan_in), b = 0."""
    bound = fan_in**-0.5
    a = jax.random.uniform(key, (batch, rank, fan_in), jnp.float32, -bound, bound)
    return a, jnp.zeros((batch, rank, fan_out), jnp.float32)


def gaussian(key, batch, rank, fan_in, fan_out):
    """a ~ N(0, 1/r²), b = 0."""
    a = jax.random.normal(key, (batch, rank, fan_in), jnp.float32) / rank
    return a, jnp.zeros((batch, rank, fan_out), jnp.float32)


def zero_a(key, batch, rank, fan_in, fan_out):
    """a = 0, b ~ N(0, 1)."""
    b = jax.random.normal(key, (batch, rank, fan_out), jnp.float32)
    return jnp.zeros((batch, rank, fan_in), jnp.float32), b


def orthogonal(key, batch, rank, fan_in, fan_out):
    """a mixes half of the rows of an orthogonal matrix, b the other half: aᵀb = 0, though neither is zero.

    With Q orthogonal, `[rank, rank]`, and G, H normal, a = Q[0::2]ᵀG / 10 and b = Q[1::2]ᵀH / 10. The product is zero
    up to the rounding of the products that form it.
    """
    if rank % 2:
        raise ValueError(f"init='orthogonal' requires an even rank, half of it for a and half for b; got {rank}.")
    keys = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(keys[0], (batch, rank, rank), jnp.float32))

    def mixed(rows, key, size):
        normal = jax.random.normal(key, (batch, rank // 2, size), jnp.float32)
        return jnp.matmul(rows.mT, normal, precision=lax.Precision.HIGHEST) / 10

    return mixed(q[:, 0::2], keys[1], fan_in), mixed(q[:, 1::2], keys[2], fan_out)
