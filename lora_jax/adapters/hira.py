"""HiRA: the weight times a low-rank matrix, elementwise: a change of high rank."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import chain, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT, zeros
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, static, trained


@adapter("HiRA")
class HiRAAdapter(Adapter):
    """W' = W ⊙ (1 + Σᵣ a[r, in] · b[r, out]).

    Attributes:
      a: `[*batch, rank, *in]`.
      b: `[*batch, rank, *out]`.
      axes: The role of each axis of the weight.
    """

    a: jax.Array = trained("batch rank in")
    b: jax.Array = trained("batch rank out")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    merged_because = "HiRA multiplies the weight elementwise, so that its change has no low rank"

    def merge(self, weight: jax.Array) -> jax.Array:
        dtype = compute_dtype(weight.dtype)
        a, b = (dataclasses.replace(f, array=f.array.astype(dtype)) for f in (self.factor("a"), self.factor("b")))
        order = [(str(axis), size) for axis, size in enumerate(weight.shape)]
        gain = 1.0 + chain(a, [b], order, precision=lax.Precision.HIGHEST)
        return (weight.astype(dtype) * gain).astype(weight.dtype)

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        return dataclasses.replace(self, **zeros(self))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@dataclasses.dataclass(frozen=True)
class HiRA(Recipe):
    r"""Multiplies a frozen weight by a trained low-rank matrix, elementwise: :math:`W \odot (1 + A^\top B)`.

    The change has up to the rank of the weight. The weight is merged before each use, and its gradient is as large as
    the weight.

    Args:
      rank: The rank of the matrix; at most the smaller of the weight's in and out sizes.
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of the factors.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = HiRA(rank=2).create(jax.random.key(0), jnp.ones((16, 32)), ("in", "out"))
      >>> adapter.a.shape, adapter.b.shape
      ((2, 16), (2, 32))

    References:
      Huang et al., `HiRA <https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025, §3
    """

    rank: int
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("HiRA", "rank", self.rank)
        checks.floating("HiRA", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> HiRAAdapter:
        axes = roles.in_and_out("HiRA", axes, weight.shape)
        batch, in_sizes, out_sizes = (roles.sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT))
        roles.check_rank("HiRA", self.rank, weight.shape, axes)
        bound = math.prod(in_sizes) ** -0.5
        a = jax.random.uniform(key, (*batch, self.rank, *in_sizes), jnp.float32, -bound, bound)
        b = jnp.zeros((*batch, self.rank, *out_sizes), self.dtype)
        return HiRAAdapter(a=a.astype(self.dtype), b=b, axes=axes)
