"""LoHa: the elementwise product of two low-rank terms."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, chain, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT, RANK
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.renamed import module_getattr


@adapter("LoHa")
class LoHaAdapter(Adapter):
    """ΔW = scale · (Σᵣ a1[r] · b1[r]) ⊙ (Σᵣ a2[r] · b2[r]).

    ΔW is of rank rank² at most: its factors are the products of each row of a1 with each of a2, and likewise of b1
    and b2. It is applied through them if rank² is at most the rank of the weight, and merged otherwise.

    Attributes:
      a1: `[*batch, rank, *in]`.
      b1: `[*batch, rank, *out]`.
      a2: `[*batch, rank, *in]`.
      b2: `[*batch, rank, *out]`.
      scale: Scalar.
      axes: The role of each axis of the weight.
    """

    a1: jax.Array = trained("batch rank in")
    b1: jax.Array = trained("batch rank out")
    a2: jax.Array = trained("batch rank in")
    b2: jax.Array = trained("batch rank out")
    scale: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True
    merged_because = "LoHa's rank² is above the rank of the weight, so that its term is not of low rank"

    def factored(self, weight: jax.Array) -> Factored | None:
        del weight
        fan_in, fan_out = (math.prod(roles.sizes(self.shape(), self.axes, role)) for role in (IN, OUT))
        if (self.rank or 0) ** 2 > min(fan_in, fan_out):
            return None
        dtype = compute_dtype(self.a1.dtype)
        a, b = self._pairwise("a1", "a2"), self._pairwise("b1", "b2")
        return self.form(a, Factor(b.array * self.scale.astype(dtype), b.labels))

    def _pairwise(self, one: str, two: str) -> Factor:
        """The product of each row of one factor with each row of the other, `[*batch, rank², …]`."""
        labels, dtype = self.labels(one), compute_dtype(self.a1.dtype)
        lead = labels.index(RANK)
        x, y = getattr(self, one).astype(dtype), getattr(self, two).astype(dtype)
        products = jnp.expand_dims(x, lead + 1) * jnp.expand_dims(y, lead)
        return Factor(products.reshape(*x.shape[:lead], -1, *x.shape[lead + 1 :]), labels)

    def merge(self, weight: jax.Array) -> jax.Array:
        dtype = compute_dtype(weight.dtype)
        order = [(str(axis), size) for axis, size in enumerate(weight.shape)]

        def term(a: str, b: str) -> jax.Array:
            one, two = (Factor(getattr(self, name).astype(dtype), self.labels(name)) for name in (a, b))
            return chain(one, [two], order, precision=lax.Precision.HIGHEST)

        change = self.scale.astype(dtype) * term("a1", "b1") * term("a2", "b2")
        return (weight.astype(dtype) + change).astype(weight.dtype)

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@dataclasses.dataclass(frozen=True)
class LoHa(Recipe):
    r"""The elementwise product of two low-rank terms: :math:`W + s\,(A_1^\top B_1) \odot (A_2^\top B_2)`.

    Args:
      rank: The rank of each term; the product's is up to its square. At most the weight's smaller in or out size.
      alpha: The scale's numerator, over the rank; None makes the scale 1.
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of the factors.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = LoHa(rank=4, alpha=4).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.a1.shape, adapter.b2.shape, float(adapter.scale)
      ((4, 16), (4, 32), 1.0)

    References:
      Hyeon-Woo et al., `FedPara <https://arxiv.org/abs/2108.06098>`_, 2021, §2.2; Yeh et al.,
      `LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2023, §3.3, for the starting values
    """

    rank: int
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("LoHa", "rank", self.rank)
        checks.scaling("LoHa", self.alpha, self._scale)
        checks.floating("LoHa", self.dtype)

    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> LoHaAdapter:
        axes = roles.in_and_out("LoHa", axes, weight.shape)
        batch, in_sizes, out = (roles.sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT))
        roles.check_rank("LoHa", self.rank, weight.shape, axes)
        one, two, three = jax.random.split(key, 3)

        def normal(key: jax.Array, sizes: tuple[int, ...], deviation: float) -> jax.Array:
            return (deviation * jax.random.normal(key, (*batch, self.rank, *sizes), jnp.float32)).astype(self.dtype)

        return LoHaAdapter(
            a1=normal(one, in_sizes, 1.0),
            b1=normal(two, out, 0.1),
            a2=normal(three, in_sizes, 1.0),
            b2=jnp.zeros((*batch, self.rank, *out), self.dtype),
            scale=jnp.asarray(self._scale(), jnp.float32),
            axes=axes,
        )


__getattr__ = module_getattr(__name__, HadamardProduct="LoHaAdapter")
