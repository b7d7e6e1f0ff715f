"""A contraction whose low-rank part is still to be added to it."""

import dataclasses
from typing import Any

import jax

from lora_jax.transform import jaxprs


@dataclasses.dataclass(frozen=True)
class Product:
    """`x·W` and `(x·a)·b`, not yet added up.

    What the function itself adds next (a bias, a residual) is added to `x·W`, and the low-rank part after
    it. XLA then keeps one array for the backward pass; with the low-rank part added first it copies the
    cheap second sum into every consumer and keeps both products instead.

    Attributes:
      base: The product with the base weight, and what has been added to it.
      update: The low-rank part, of the same shape and dtype.
      equation: Where the contraction comes from.
    """

    base: jax.Array
    update: jax.Array
    equation: Any

    def total(self) -> jax.Array:
        """The sum, under the name of the contraction."""
        with jaxprs.context(self.equation):
            return self.base + self.update

    def plus(self, equation: jaxprs.Equation, values: list[Any]) -> "Product":
        """The product after an addition, in which `values` holds it and an independent array."""
        (base,) = jaxprs.bind(equation, [self.base if value is self else value for value in values])
        return dataclasses.replace(self, base=base)
