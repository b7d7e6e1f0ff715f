"""Quantized weights in the interpreter: each use dequantizes the weight and then applies its views."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.transform import jaxprs
from lora_jax.transform.regions import region

ELEMENTWISE = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "optimization_barrier")
"""Elementwise views, which act on a part of a weight as they act on the whole."""


@dataclasses.dataclass(frozen=True)
class View:
    """An equation that makes a view of the weight.

    Attributes:
      equation: It.
      operand: Position of the weight among its operands.
      output: Which of its outputs the view is.
    """

    equation: jaxprs.Equation
    operand: int = 0
    output: int = 0

    def __call__(self, value: jax.Array, others: Sequence[Any]) -> jax.Array:
        with jaxprs.context(self.equation):
            if self.equation.primitive.name == "pvary":
                return jaxprs.varying_over(value, self.equation.params["axes"])
            operands = [*others[: self.operand], value, *others[self.operand :]]
            return jaxprs.bind(self.equation, operands)[self.output]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LazyDequantized:
    """A quantized leaf under views, carried instead of an array. It is a pytree, so it crosses jit, scan, ….

    Attributes:
      leaf: The pytree node with `dequantize()`.
      others: For each view, its other operands: arrays, or other quantized weights.
      views: In order.
      shape: Under the views.
      dtype: Under the views.
    """

    leaf: Any
    others: tuple[tuple[Any, ...], ...]
    views: tuple[View, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, leaf: Any) -> "LazyDequantized":
        """Returns a leaf without views."""
        return cls(leaf, (), (), tuple(leaf.shape), np.dtype(leaf.dtype))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def compute(self) -> jax.Array:
        """Dequantizes the leaf and applies the views."""
        leaf = self.leaf.at_use() if hasattr(self.leaf, "at_use") else self.leaf
        value = leaf.dequantize()
        for view, others in zip(self.views, self.others):
            arrays = [other.compute() if isinstance(other, LazyDequantized) else other for other in others]
            value = view(value, arrays)
        return value

    def under(self, view: View, others: Sequence[Any]) -> "LazyDequantized":
        """Returns the weight with one more view."""
        aval = view.equation.outvars[view.output].aval
        return dataclasses.replace(
            self,
            views=(*self.views, view),
            others=(*self.others, tuple(others)),
            shape=tuple(aval.shape),
            dtype=np.dtype(aval.dtype),
        )

    @property
    def layers(self) -> int:
        """The number of leading axes that every array of the leaf has: a slice of the arrays is a slice of the leaf."""
        return getattr(self.leaf, "layers", 0) if self._by_element else 0

    @property
    def _by_element(self) -> bool:
        return all(view.equation.primitive.name in ELEMENTWISE for view in self.views)

    def with_leaf(self, leaf: Any) -> "LazyDequantized":
        """Returns the same views of a part of the leaf along its layers."""
        return dataclasses.replace(self, leaf=leaf, shape=tuple(leaf.shape))

    def parts(self, spec: Any, mesh: Any) -> "tuple[LazyDequantized, LazyDequantized] | None":
        """For `shard_map`: a weight that can be sharded, and the same with the partition spec of each array."""
        if not self._by_element or not hasattr(self.leaf, "parts"):
            return None
        divided = self.leaf.parts(spec, mesh)
        if divided is None:
            return None
        leaf, specs = divided
        return dataclasses.replace(self, leaf=leaf), dataclasses.replace(self, leaf=specs)

    def rows(self, take: Callable[[jax.Array], jax.Array]) -> "LazyDequantized | None":
        """Returns the rows that `take` selects on the first axis, index axes first; None if that would cut blocks."""
        rows = self.leaf.rows(take) if self._by_element and hasattr(self.leaf, "rows") else None
        return None if rows is None else self.with_leaf(rows)

    def along(self, axis: int, slice_array: Callable[[jax.Array], jax.Array]) -> "LazyDequantized | None":
        """Applies `slice_array` to each array, along an axis of layers; returns None for other axes."""
        return self.with_leaf(jax.tree.map(slice_array, self.leaf)) if axis < self.layers else None


def apply_view(equation: jaxprs.Equation, values: Sequence[Any]) -> list[Any]:
    """The results of an equation that makes views: of arrays at once, of quantized weights when they are used."""
    lazy = next((operand for operand, value in enumerate(values) if isinstance(value, LazyDequantized)), None)
    if lazy is None:
        return jaxprs.bind(equation, values)
    others = [value for operand, value in enumerate(values) if operand != lazy]
    return [values[lazy].under(View(equation, lazy, output), others) for output in range(len(equation.outvars))]


def recomputed(function: Callable, *values: Any) -> Any:
    """Returns `function(*values)` with quantized weights dequantized.

    The backward pass keeps their codes and dequantizes again: the function is rematerialized, and XLA may not share
    the arrays of the two passes.

    Args:
      function: Of arrays, and of pytrees that may hold :class:`LazyDequantized` (which it then computes itself).
      *values: Arrays, or pytrees with quantized weights among them.
    """
    nodes = jax.tree.leaves(values, is_leaf=lambda node: isinstance(node, LazyDequantized))
    if not any(isinstance(node, LazyDequantized) for node in nodes):
        return function(*values)

    def computed(*values):
        return function(*(value.compute() if isinstance(value, LazyDequantized) else value for value in values))

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        return computed(*values)  # there is no backward pass
    return jax.checkpoint(computed, policy=jax.checkpoint_policies.nothing_saveable)(*values)


def product(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, value: "jax.Array | LazyDequantized"
) -> Any:
    """Returns `function(x, W)`, linear in x, for a weight that may be quantized. It is dequantized at each use.

    The backward pass keeps only the codes and dequantizes again.
    """
    if not isinstance(value, LazyDequantized):
        return function(x, value)

    def dequantizing(x, value):
        return function(x, value.compute())

    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((x, value))):
        return dequantizing(x, value)
    return region(dequantizing, x, value, linear=1)
