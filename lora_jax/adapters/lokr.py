"""LoKr: the Kronecker product of a small matrix with a low-rank (or full) one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.renamed import module_getattr


@adapter("LoKr")
class LoKrAdapter(Adapter):
    """ΔW = scale · c ⊗ Σᵣ a[r] · b[r]; c spans the slow part of one in and of one out axis, a and b all the rest.

    Attributes:
      c: `[*batch, in₁, out₁]`.
      a: `[*batch, rank, *in₂]`.
      b: `[*batch, rank, *out₂]`.
      scale: Scalar.
      split: The indices of the in axis and of the out axis that are divided.
      axes: The role of each axis of the weight.
    """

    c: jax.Array = trained("batch slow-in slow-out")
    a: jax.Array = trained("batch rank fast-in")
    b: jax.Array = trained("batch rank fast-out")
    scale: jax.Array = frozen("scalar")
    split: tuple[int, ...] = static()
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True

    def find_inconsistency(self) -> str | None:
        return roles.wrong_split(self.split, self.axes, (IN, OUT))

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        return self.form(_scaled(self), self.factor("a"), self.factor("b"))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@adapter("LoKr.full")
class LoKrFullAdapter(Adapter):
    """ΔW = scale · c ⊗ d.

    Attributes:
      c: `[*batch, in₁, out₁]`.
      d: `[*batch, *in₂, *out₂]`.
      scale: Scalar.
      split: The indices of the in axis and of the out axis that are divided.
      axes: The role of each axis of the weight.
    """

    c: jax.Array = trained("batch slow-in slow-out")
    d: jax.Array = trained("batch fast-in fast-out")
    scale: jax.Array = frozen("scalar")
    split: tuple[int, ...] = static()
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True

    def find_inconsistency(self) -> str | None:
        return roles.wrong_split(self.split, self.axes, (IN, OUT))

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        return self.form(_scaled(self), self.factor("d"))


Kronecker = LoKrAdapter | LoKrFullAdapter


def _scaled(node: Kronecker) -> Factor:
    """The first matrix with the scale."""
    dtype = compute_dtype(node.c.dtype)
    return Factor(node.c.astype(dtype) * node.scale.astype(dtype), node.labels("c"))


@dataclasses.dataclass(frozen=True)
class LoKr(Recipe):
    r"""A Kronecker product beside a frozen weight: :math:`W + s\,C \otimes (A^\top B)`.

    The largest in and the largest out axis are divided: c takes the smaller part of both, the second matrix the
    rest and all other axes. Where `rank` is half of the second matrix's larger side or more, that is trained in
    full, as PEFT does.

    Args:
      rank: The rank of the second matrix.
      alpha: The scale's numerator, over the rank; None makes the scale 1.
      factor: Bounds the sizes of c: the largest divisor of the axis up to it and up to the axis's square root.
        With None, only the square root bounds it.
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of the factors.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = LoKr(rank=2, alpha=4).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.c.shape, adapter.a.shape, adapter.b.shape
      ((4, 4), (2, 4), (2, 8))

    References:
      Yeh et al., `LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2023, §3.4; Edalati et al.,
      `KronA <https://arxiv.org/abs/2212.10650>`_, 2022
    """

    rank: int
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    factor: int | None = None
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("LoKr", "rank", self.rank)
        checks.scaling("LoKr", self.alpha, self._scale)
        if self.factor is not None:
            checks.positive("LoKr", "factor", self.factor)
        checks.floating("LoKr", self.dtype)

    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> Kronecker:
        axes = roles.in_and_out("LoKr", axes, weight.shape)
        split = tuple(roles.largest(weight.shape, axes, role) for role in (IN, OUT))
        first = tuple(_divisor(weight.shape[axis], self.factor) for axis in split)
        inner = [size // dict(zip(split, first)).get(axis, 1) for axis, size in enumerate(weight.shape)]
        batch, in_sizes, out = (roles.sizes(inner, axes, role) for role in (BATCH, IN, OUT))
        fan_in = math.prod(in_sizes)
        one, two = jax.random.split(key)

        def uniform(key: jax.Array, shape: Sequence[int], fan: int) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -(fan**-0.5), fan**-0.5).astype(self.dtype)

        common = {
            "c": jnp.zeros((*batch, *first), self.dtype),
            "scale": jnp.asarray(self._scale(), jnp.float32),
            "split": split,
            "axes": axes,
        }
        divided = [inner[axis] for axis in split]
        if self.rank >= max(divided) / 2:
            return LoKrFullAdapter(d=uniform(one, (*batch, *in_sizes, *out), fan_in), **common)
        return LoKrAdapter(
            a=uniform(one, (*batch, self.rank, *in_sizes), fan_in),
            b=uniform(two, (*batch, self.rank, *out), self.rank),
            **common,
        )


def _divisor(size: int, limit: int | None) -> int:
    """The largest divisor of a size up to its square root and up to a limit."""
    largest = math.isqrt(size) if limit is None else min(limit, math.isqrt(size))
    return max(divisor for divisor in range(1, largest + 1) if size % divisor == 0)


__getattr__ = module_getattr(__name__, LowRankKronecker="LoKrAdapter", FullKronecker="LoKrFullAdapter")
