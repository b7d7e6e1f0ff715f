"""Factors that make up for what quantisation takes: LoftQ."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.initializers.decomposition import singular_triplets
from lora_jax.initializers.initializer import Given, Initializer, Start


def dequantized(leaf: Any) -> jax.Array:
    """The array that a leaf stands for: itself, unless it has `dequantize()`."""
    return leaf.dequantize() if hasattr(leaf, "dequantize") else leaf


@dataclasses.dataclass(frozen=True)
class LoftQ(Initializer):
    r"""A quantised base and factors that are nearest to the weight together: :math:`W \approx Q + s\,a^\top b`.

    Alternates Q = quantizer(W − s·aᵀb) with the best a, b for W − Q. Unlike the other initialisers it changes the
    function, by less than quantising alone does. The product is divided by the scale, so that this holds for any
    alpha (PEFT does not divide: its start is near the weight for alpha = rank only).

    Args:
      quantizer: Of an array of the shape and dtype of the weight: the array that its quantised form stands for, or a
        pytree node with `dequantize()`, which then becomes the leaf of the base. (`adapt` does not take such a
        leaf yet; quantised leaves that it takes come with `quantize`.)
      iterations: How often.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> w = jax.random.normal(jax.random.key(1), (4, 4))
      >>> recipe = lora.LoRA(2, init=LoftQ(jnp.round), axes=("in", "out"))
      >>> base, delta = lora.prepare(jax.random.key(0), {"w": w}, {"w": recipe}, lambda base: base["w"], [()])
      >>> bool(jnp.linalg.norm(lora.merge(base, delta)["w"] - w) < jnp.linalg.norm(jnp.round(w) - w))
      True

    References:
      Li et al., `LoftQ <https://arxiv.org/abs/2310.08659>`_, 2023, algorithm 1
    """

    quantizer: Callable[[jax.Array], Any]
    iterations: int = 1

    moves_weight = True

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"LoftQ(iterations={self.iterations}): at least one.")

    def start(self, given: Given) -> Start:
        leaf, a, b = self._step(given, given.leaf)
        for _ in range(1, self.iterations):
            leaf, a, b = self._step(given, given.without(a, b))
        return Start(a, b, leaf)

    def _step(self, given: Given, target: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """The quantised target, and the factors that bring it nearest to the weight."""
        leaf = self.quantizer(target)
        values = dequantized(leaf)
        if jnp.shape(values) != target.shape:
            raise ValueError(f"LoftQ's quantizer made {jnp.shape(values)} of a weight of shape {target.shape}.")
        values = values.astype(target.dtype)
        u, s, v = singular_triplets(given.weight - given.matrices(values), given.rank)
        root = jnp.sqrt(s / given.scale)[:, :, None]
        return leaf if hasattr(leaf, "dequantize") else values, root * u, root * v
