"""Factors that compensate for the error of quantization: LoftQ."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.initializers.decomposition import singular_triplets
from lora_jax.initializers.initializer import Factors, Initializer, Target
from lora_jax.leaves import dequantized, is_quantized


@dataclasses.dataclass(frozen=True)
class LoftQ(Initializer):
    r"""A quantized base and factors that are nearest to the weight together: :math:`W \approx Q + s\,a^\top b`.

    Alternates Q = quantizer(W − s·aᵀb) with the best a, b for W − Q. Unlike the other initializers it changes the
    function, by less than quantizing alone does. The product is divided by the scale, so that this holds for any
    alpha (PEFT does not divide: its start is near the weight for alpha = rank only).

    Args:
      quantizer: A format (`lora_jax.NF4()`), whose leaf replaces the weight in the base. Or a function of an array of
        the shape and dtype of the weight, which returns its dequantized values, or a pytree node with
        `dequantize()`, `shape` and `dtype`.
      iterations: The number of alternations.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> w, x = jax.random.normal(jax.random.key(1), (64, 32)), jnp.ones((1, 64))
      >>> spec = {"w": lora.LoRA(4, init=LoftQ(lora.NF4()))}
      >>> base, delta = lora.prepare(jax.random.key(0), {"w": w}, spec, lambda base, x: x @ base["w"], [x])
      >>> base["w"]
      NF4[64, 32](dtype=float32, block=64, double, 4.156 bits)
      >>> bool(jnp.linalg.norm(lora.merge(base, delta)["w"] - w) < jnp.linalg.norm(base["w"].dequantize() - w))
      True

    References:
      Li et al., `LoftQ <https://arxiv.org/abs/2310.08659>`_, 2023, algorithm 1
    """

    quantizer: Callable[[jax.Array], Any] | Any
    iterations: int = 1

    moves_weight = True

    def __post_init__(self):
        if isinstance(self.quantizer, type):
            raise ValueError(f"LoftQ(quantizer={self.quantizer.__name__}): write {self.quantizer.__name__}().")
        checks.positive("LoftQ", "iterations", self.iterations)

    def make_factors(self, target: Target) -> Factors:
        if is_quantized(target.leaf):
            raise ValueError(
                "LoftQ compensates for the error of quantization, and this weight is quantized already: pass the base "
                "in floats to prepare, which returns the quantized one."
            )
        leaf, a, b = self._step(target, target.leaf)
        for _ in range(1, self.iterations):
            leaf, a, b = self._step(target, target.residual(a, b))
        return Factors(a, b, leaf)

    def _step(self, target: Target, residual: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        """Quantizes the residual, and computes the factors that bring it nearest to the weight."""
        # A format needs the axes that are contracted; a function quantizes as it wants.
        form: Any = self.quantizer
        leaf = form.quantize(residual, target.axes) if hasattr(form, "quantize") else form(residual)
        values = dequantized(leaf)
        if jnp.shape(values) != residual.shape:
            raise ValueError(
                f"LoftQ's quantizer returned the shape {jnp.shape(values)} for a weight of shape {residual.shape}."
            )
        values = values.astype(residual.dtype)
        u, s, v = singular_triplets(target.weight - target.matrices(values), target.rank)
        root = jnp.sqrt(s / target.scale)[:, :, None]
        return leaf if is_quantized(leaf) else values, root * u, root * v
