"""A contraction whose low-rank part has not been added yet."""

import dataclasses
from typing import Any

import jax

from lora_jax.transform import jaxprs


@dataclasses.dataclass(frozen=True)
class Product:
    """`x·W` and `(x·a)·b` as separate arrays.

    If the function adds an array next (a bias, a residual), it is added to `x·W` first, and the low-rank part after
    it. XLA then keeps one array for the backward pass. With the low-rank part added first, XLA copies the cheap second
    sum into every consumer and keeps both products.

    Attributes:
      base: The product with the base weight, plus the arrays added since.
      update: The low-rank part, of the same shape and dtype.
      equation: The contraction.
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
