"""MiSS: trained rows that are repeated along the in axis."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained


@adapter("MiSS", sizes=("row",))
class MiSSAdapter(Adapter):
    """ΔW[in, out] = scale · d[in mod rank, out].

    An input is summed over its shards before the one product with `d`.

    Attributes:
      d: `[*batch, rank, *out]`.
      scale: Scalar.
      dropout: Scalar; the rate on the input of the low-rank product if a dropout key is passed.
      shards: The size of the divided in axis over the rank.
      rest: The sizes of the in axes, the rank in place of the divided one.
      split: The number of the divided in axis.
      axes: The role of each axis of the weight.
    """

    d: jax.Array = trained("batch row out")
    scale: jax.Array = frozen("scalar")
    dropout: jax.Array = frozen("scalar")
    shards: int = static("slow-in")
    rest: tuple[int, ...] = static("fast-in")
    split: tuple[int, ...] = static()
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True

    def find_inconsistency(self) -> str | None:
        return roles.wrong_split(self.split, self.axes, (IN,))

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        dtype, row = compute_dtype(self.d.dtype), f"{self.split[0]}.1"
        same = Factor(jnp.eye(self.d.shape[self.axes.count(BATCH)], dtype=dtype), (row, "row"))
        d = Factor(self.d.astype(dtype) * self.scale.astype(dtype), self.labels("d"))
        return self.form(same, d, dropout=self.dropout)

    def describe(self) -> dict[str, Any]:
        return {"rank": self.d.shape[self.axes.count(BATCH)]}


@dataclasses.dataclass(frozen=True)
class MiSS(Recipe):
    r"""Trains `rank` rows that are repeated along the in axis: :math:`W + s\,(D; D; \dots)`.

    The largest in axis is divided.

    Args:
      rank: The number of rows; divides the in axis.
      axes: The role of each axis of the weight; None takes them from the trace.
      dropout: Rate on the input of the product with the rows, if `adapted` is given a `dropout_key`.
      dtype: The dtype of the rows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = MiSS(rank=4).create(jax.random.key(0), jnp.ones((16, 32)), ("in", "out"))
      >>> adapter.d.shape, adapter.shape()
      ((4, 32), (16, 32))

    References:
      Kang and Yin, `MiSS <https://arxiv.org/abs/2409.15371>`_, 2024, §3
    """

    rank: int
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("MiSS", "rank", self.rank)
        checks.rate("MiSS", "dropout", self.dropout)
        checks.floating("MiSS", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> MiSSAdapter:
        del key
        axes = roles.in_and_out("MiSS", axes, weight.shape)
        axis = roles.largest(weight.shape, axes, IN)
        shards = roles.divided("MiSS", "rank", self.rank, weight.shape, axis)
        parts = [self.rank if number == axis else size for number, size in enumerate(weight.shape)]
        batch, out_sizes = (roles.sizes(weight.shape, axes, role) for role in (BATCH, OUT))
        return MiSSAdapter(
            d=jnp.zeros((*batch, self.rank, *out_sizes), self.dtype),
            scale=jnp.ones((), jnp.float32),
            dropout=jnp.asarray(self.dropout, jnp.float32),
            shards=shards,
            rest=roles.sizes(parts, axes, IN),
            split=(axis,),
            axes=axes,
        )
