"""LoRA-XS: a small trained matrix between frozen singular vectors of the weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT
from lora_jax.adapters.matrices import Matrices
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.initializers.decomposition import singular_triplets
from lora_jax.leaves import dequantized, is_abstract


@adapter("LoRA-XS")
class LoRAXSAdapter(Adapter):
    """ΔW[in, out] = scale · Σᵣₛ a[r, in] · core[r, s] · b[s, out].

    Attributes:
      core: `[*batch, rank, rank]`.
      a: `[*batch, rank, *in]`, frozen: singular vectors of the weight.
      b: `[*batch, rank, *out]`, frozen: singular vectors times singular values.
      scale: Scalar.
      dropout: Scalar; the rate on the input of the low-rank product if a dropout key is passed.
      axes: The role of each axis of the weight.
    """

    core: jax.Array = trained("batch rank rank")
    a: jax.Array = frozen("batch rank in")
    b: jax.Array = frozen("batch rank out")
    scale: jax.Array = frozen("scalar")
    dropout: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        dtype = compute_dtype(self.core.dtype)
        core = Factor(self.core.astype(dtype) * self.scale.astype(dtype), self.labels("core"))
        return self.form(self.factor("a"), core, self.factor("b", rank="rank'"), dropout=self.dropout)

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@dataclasses.dataclass(frozen=True)
class LoRAXS(Recipe):
    r"""Trains a rank × rank matrix between frozen singular vectors: :math:`W + s\,U_r R\,\Sigma_r V_r^\top`.

    U and V are the leading singular vectors of the weight, of its in and its out axes. R starts from zero (the
    authors draw it with a deviation of 1e-5).

    Args:
      rank: At most the smaller of the weight's in and out sizes.
      alpha: The scale's numerator, over the rank; None makes the scale 1.
      niter: Subspace iterations of a randomized decomposition, for large matrices; None for the exact one.
      axes: The role of each axis of the weight; None takes them from the trace.
      dropout: Rate on the input of the low-rank product, if `adapted` is given a `dropout_key`.
      dtype: The dtype of the matrices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = LoRAXS(rank=2).create(jax.random.key(0), jnp.eye(16, 32), ("in", "out"))
      >>> adapter.core.shape, adapter.a.shape, adapter.b.shape
      ((2, 2), (2, 16), (2, 32))

    References:
      Bałazy et al., `LoRA-XS <https://arxiv.org/abs/2405.17604>`_, 2024, §3
    """

    rank: int
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    niter: int | None = None
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("LoRAXS", "rank", self.rank)
        checks.scaling("LoRAXS", self.alpha, self._scale)
        if self.niter is not None:
            checks.positive("LoRAXS", "niter", self.niter)
        checks.rate("LoRAXS", "dropout", self.dropout)
        checks.floating("LoRAXS", self.dtype)

    def _scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> LoRAXSAdapter:
        axes = roles.in_and_out("LoRAXS", axes, weight.shape)
        roles.check_rank("LoRAXS", self.rank, weight.shape, axes)
        if is_abstract(weight):
            raise ValueError("LoRAXS(…) decomposes the weight; the base has its shape only.")
        batch, in_sizes, out_sizes = (roles.sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT))
        matrices = Matrices(axes=axes, blocks=(True,), batch=batch, in_sizes=in_sizes, out_sizes=out_sizes)
        u, s, v = singular_triplets(matrices.from_weight(dequantized(weight)), self.rank, niter=self.niter, key=key)
        return LoRAXSAdapter(
            core=jnp.zeros((*batch, self.rank, self.rank), self.dtype),
            a=u.reshape(*batch, self.rank, *in_sizes).astype(self.dtype),
            b=(s[:, :, None] * v).reshape(*batch, self.rank, *out_sizes).astype(self.dtype),
            scale=jnp.asarray(self._scale(), jnp.float32),
            dropout=jnp.asarray(self.dropout, jnp.float32),
            axes=axes,
        )
