"""How the factors of a low-rank term start.

An initialiser either draws factors whose product is zero, so that training starts from the base
function, or factors a part of the weight, which is then taken out of the base.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Draw = Callable[[jax.Array, int, int, int, int], tuple[jax.Array, jax.Array]]
"""(key, batch, rank, fan_in, fan_out) -> a `[batch, rank, fan_in]`, b `[batch, rank, fan_out]`, float32."""

Split = Callable[[jax.Array, int, float], tuple[jax.Array, jax.Array]]
"""(weight `[batch, in, out]`, rank, scale) -> a, b with scale·aᵀb the part of the weight that moves."""


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A way to start the factors: give exactly one of `draw` and `split`.

    Attributes:
      draw: Draws factors from a key and sizes.
      lookup: Draws them for a weight that is indexed; `draw` where None.
      split: Makes them from the weight; its part leaves the base.
    """

    draw: Draw | None = None
    lookup: Draw | None = None
    split: Split | None = None

    def __post_init__(self):
        if (self.draw is None) == (self.split is None):
            raise ValueError("An Initializer has either draw= or split=.")

    @property
    def moves_weight(self) -> bool:
        """Whether a part of the weight moves into the factors."""
        return self.split is not None

    def random(self, key, batch: int, rank: int, fan_in: int, fan_out: int, *, lookup: bool):
        """Factors drawn for a weight that is contracted, or indexed (`lookup`)."""
        draw = self.lookup if lookup and self.lookup is not None else self.draw
        assert draw is not None
        return draw(key, batch, rank, fan_in, fan_out)

    def factors_of(self, weight: jax.Array, rank: int, scale: float):
        """Factors made from the weight."""
        assert self.split is not None
        return self.split(weight, rank, scale)


def _kaiming_uniform(key, batch, rank, fan_in, fan_out):
    bound = fan_in**-0.5
    a = jax.random.uniform(key, (batch, rank, fan_in), jnp.float32, -bound, bound)
    return a, jnp.zeros((batch, rank, fan_out), jnp.float32)


def _gaussian(key, batch, rank, fan_in, fan_out):
    a = jax.random.normal(key, (batch, rank, fan_in), jnp.float32) / rank
    return a, jnp.zeros((batch, rank, fan_out), jnp.float32)


def _zero_a(key, batch, rank, fan_in, fan_out):
    b = jax.random.normal(key, (batch, rank, fan_out), jnp.float32)
    return jnp.zeros((batch, rank, fan_in), jnp.float32), b


def _pissa(weight, rank, scale):
    u, s, vt = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(s[:, :rank] / scale)[:, :, None]
    return root * jnp.swapaxes(u[:, :, :rank], 1, 2), root * vt[:, :rank, :]


def _olora(weight, rank, scale):
    q, r = jnp.linalg.qr(jnp.swapaxes(weight, 1, 2))
    return r[:, :rank, :], jnp.swapaxes(q[:, :, :rank], 1, 2)


INITIALIZERS: dict[str, Initializer] = {
    # a ~ U(±1/√fan_in), b = 0; for lookups a = 0, b ~ N(0, 1), as loralib and PEFT start embeddings.
    "kaiming_uniform": Initializer(draw=_kaiming_uniform, lookup=_zero_a),
    # a ~ N(0, 1/r²), b = 0.
    "gaussian": Initializer(draw=_gaussian),
    # a = 0, b ~ N(0, 1): Adam's first step then does not depend on the sign of tiny gradients of b.
    "zero_a": Initializer(draw=_zero_a),
    # The r largest singular directions (Meng et al., PiSSA, arXiv 2404.02948, §3).
    "pissa": Initializer(split=_pissa),
    # The first r columns of Q and rows of R (Büyükakyüz, OLoRA, arXiv 2406.01775).
    "olora": Initializer(split=_olora),
}


def find(init: str | Initializer) -> Initializer:
    """The initialiser of a name; an :class:`Initializer` is itself.

    Raises:
      ValueError: No such name.
    """
    if isinstance(init, Initializer):
        return init
    if init not in INITIALIZERS:
        raise ValueError(f"init={init!r}: expected one of {', '.join(map(repr, INITIALIZERS))} or an Initializer.")
    return INITIALIZERS[init]
