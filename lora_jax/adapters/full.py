"""Leaves and rows that are trained in full: heads, norms, biases, new tokens."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, LOOKUP, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, check_axes, check_weight, frozen, static, trained
from lora_jax.leaves import dequantized, is_abstract
from lora_jax.renamed import module_getattr


@adapter("Full")
class FullAdapter(Adapter):
    """A leaf trained in full.

    Attributes:
      value: Replaces the weight.
      axes: Empty: no role is needed.
    """

    value: jax.Array = trained("weight")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    merged_because = "Full trains the weight itself"

    def merge(self, weight: jax.Array) -> jax.Array:
        return self.value.astype(weight.dtype)

    def identity_like(self, weight: jax.Array | None) -> Self:
        return dataclasses.replace(self, value=dequantized(check_weight(weight, self.kind)).astype(self.value.dtype))


def enlarges(node: Adapter, shape: tuple[int, ...]) -> bool:
    """Whether an adapter replaces a weight of this shape by one that is larger along one axis: more tokens."""
    if not isinstance(node, FullAdapter) or len(node.shape()) != len(shape):
        return False
    different = [(new, old) for new, old in zip(node.shape(), shape) if new != old]
    return len(different) == 1 and different[0][0] > different[0][1]


@dataclasses.dataclass(frozen=True)
class Full(Recipe):
    """Trains a leaf in full, starting from its value: classifier heads, norms, biases.

    Args:
      dtype: The dtype of the trained copy; None is float32, or the base's dtype where that is wider. The function
        still sees the dtype of the base.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> Full().create(jax.random.key(0), jnp.ones(3, jnp.bfloat16), ()).value.dtype.name
      'float32'
    """

    dtype: jax.typing.DTypeLike | None = None

    needs_axes = False

    def __post_init__(self):
        if self.dtype is not None:
            checks.floating("Full", self.dtype, jnp.inexact)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> FullAdapter:
        del key, axes
        if is_abstract(weight):
            raise ValueError("Full() starts from the leaf's value; the base has its shape only.")
        weight = dequantized(weight)
        return FullAdapter(value=jnp.array(weight, dtype=self.dtype or compute_dtype(weight.dtype), copy=True), axes=())


@adapter("Rows", sizes=("row",))
class RowsAdapter(Adapter):
    """Chosen rows of a lookup table trained in full.

    Attributes:
      rows: `[n, *out]`; replace rows of the table.
      ids: `[n]`, int32; which rows.
      count: The number of rows of the table.
      axes: The role of each axis of the table: one in axis, the others out.
    """

    rows: jax.Array = trained("row out")
    ids: jax.Array = frozen("row")
    count: int = static("in")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    def factored(self, weight: jax.Array) -> Factored:
        # W + onehotᵀ·(rows − W[ids]): a low-rank term whose first factor is fixed.
        axis = self.axes.index(IN)
        old = jnp.moveaxis(jnp.take(dequantized(weight), self.ids, axis=axis), axis, 0).astype(self.rows.dtype)
        onehot = jax.nn.one_hot(self.ids, self.count, dtype=self.rows.dtype)
        return self.form(Factor(onehot, ("row", str(axis))), Factor(self.rows - old, self.labels("rows")))

    def merge(self, weight: jax.Array) -> jax.Array:
        axis = self.axes.index(IN)
        table = jnp.moveaxis(weight, axis, 0)
        return jnp.moveaxis(table.at[self.ids].set(self.rows.astype(weight.dtype)), 0, axis)

    def identity_like(self, weight: jax.Array | None) -> Self:
        rows = jnp.take(dequantized(check_weight(weight, self.kind)), self.ids, axis=self.axes.index(IN))
        return dataclasses.replace(self, rows=jnp.moveaxis(rows, self.axes.index(IN), 0).astype(self.rows.dtype))

    def describe(self) -> dict[str, Any]:
        return {"rows": self.rows.shape[0]}


@dataclasses.dataclass(frozen=True)
class Rows(Recipe):
    """Trains chosen rows of an embedding in full (new or special tokens), the rest stays frozen.

    Args:
      ids: The rows, each once.
      axes: The role of each axis; None takes them from the trace.
      dtype: The dtype of the trained rows; None as for `Full`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> Rows([0, 5]).create(jax.random.key(0), jnp.ones((8, 4)), ("lookup", "out")).rows.shape
      (2, 4)
    """

    ids: tuple[int, ...]
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self):
        rows: Any = self.ids
        if not isinstance(rows, Iterable):
            raise TypeError(
                f"Rows(ids={rows!r}): expected a sequence of row numbers; for one row write Rows([{rows}])."
            )
        rows = rows.tolist() if isinstance(rows, np.ndarray | jax.Array) else rows
        ids = tuple(checks.integer("Rows", "ids", row) for row in rows)
        object.__setattr__(self, "ids", ids)
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0:
            raise ValueError(f"Rows(ids={ids}): ids are distinct, at least 0, and at least one.")
        if self.dtype is not None:
            checks.floating("Rows", self.dtype, jnp.inexact)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> RowsAdapter:
        del key
        check_axes(axes, weight.shape)
        rows = [i for i, role in enumerate(axes) if role in (IN, LOOKUP)]
        if len(rows) != 1 or BATCH in axes:
            raise ValueError(f"Rows needs one in axis and no batch axis; the weight has the roles {axes}.")
        (axis,) = rows
        count = weight.shape[axis]
        if max(self.ids) >= count:
            raise ValueError(f"Rows(ids=…) names row {max(self.ids)}; the table has {count} rows.")
        ids = jnp.asarray(self.ids, jnp.int32)
        old = jnp.moveaxis(jnp.take(dequantized(weight), ids, axis=axis), axis, 0)
        return RowsAdapter(
            rows=old.astype(self.dtype or compute_dtype(weight.dtype)),
            ids=ids,
            count=count,
            axes=tuple(IN if i == axis else OUT for i in range(len(axes))),
        )


__getattr__ = module_getattr(__name__, Replacement="FullAdapter", RowReplacement="RowsAdapter")
