"""The contractions of a jaxpr that have the shape of a weight."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lora_jax.adapters.protocol import BATCH, IN, OUT
from lora_jax.adapters.roles import contracted

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "lora_ragged_product", "scatter-add")


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, at any depth."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for body in bodies(equation):
            yield from equations(body)


def bodies(equation: Any) -> Iterator[Any]:
    """The jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                yield item


def weight_gradients(jaxpr: Any, weights: Sequence[tuple[Sequence[int], Sequence[str]]]) -> list[str]:
    """The contractions of a jaxpr whose result has the shape of a weight, transposed or flattened.

    Args:
      jaxpr: The jaxpr of a gradient, from `jax.make_jaxpr`.
      weights: The shape of each weight and the roles of its axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> gradient = jax.grad(lambda w, x: (x @ w).sum())
      >>> weight_gradients(jax.make_jaxpr(gradient)(jnp.ones((4, 3)), jnp.ones((5, 4))), [((4, 3), ("in", "out"))])
      ['dot_general -> (3, 4)']
    """
    shapes = set().union(*(weight_forms(shape, axes) for shape, axes in weights))
    return [
        f"{equation.primitive.name} -> {out.aval.shape}"
        for equation in equations(jaxpr)
        if equation.primitive.name in CONTRACTIONS
        for out in equation.outvars
        if sorted_sizes(out.aval.shape) in shapes
    ]


def weight_forms(shape: Sequence[int], axes: Sequence[str]) -> set[tuple[int, ...]]:
    """The shapes in which the gradient of a weight may occur: any order of axes, groups flattened, one layer."""
    groups = {role: [n for n, r in zip(shape, contracted(axes)) if r == role] for role in (BATCH, IN, OUT)}
    fan_in, fan_out = math.prod(groups[IN]), math.prod(groups[OUT])
    forms = [shape, [*groups[BATCH], fan_in, fan_out], [fan_in, fan_out], [*groups[IN], *groups[OUT]]]
    return {sorted_sizes(form) for form in forms}


def sorted_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of an array's axes in increasing order, without those of size 1."""
    return tuple(sorted(size for size in shape if size != 1))
