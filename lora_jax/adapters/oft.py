"""OFT: an orthogonal matrix of blocks, by the Cayley transform, that rotates the inputs of a frozen weight."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT, zeros
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, static, trained
from lora_jax.leaves import dequantized


@adapter("OFT", sizes=("skew",))
class OFTAdapter(Adapter):
    """W' = R · W with R = diag(R₁, R₂, …), each Rᵢ orthogonal.

    With Q the skew-symmetric matrix whose upper triangle is a row of `q`, Rᵢ = (I − Q)(I + Q)⁻¹, or the first `terms`
    terms of the series of (I + Q)(I − Q)⁻¹. The factored form is x·W + (x·(R − I))·W: neither R·W nor its gradient is
    formed.

    Attributes:
      q: `[*batch, blocks, n(n − 1)/2]` for blocks of size n.
      terms: The number of terms of the series; 0 for the exact transform.
      rest: The sizes of the in axes, the block size in place of the divided one.
      out: The sizes of the out axes.
      split: The index of the divided in axis.
      axes: The role of each axis of the weight.
    """

    q: jax.Array = trained("batch slow-in skew")
    terms: int = static()
    rest: tuple[int, ...] = static("fast-in")
    out: tuple[int, ...] = static("out")
    split: tuple[int, ...] = static()
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    def find_inconsistency(self) -> str | None:
        if problem := roles.wrong_split(self.split, self.axes, (IN,)):
            return problem
        size = self._block_size()
        fits = self.q.shape[-1] == size * (size - 1) // 2
        return None if fits else f"q has {self.q.shape[-1]} entries a block; blocks of size {size} have others."

    def _block_size(self) -> int:
        return self.rest[[axis for axis, role in enumerate(self.axes) if role == IN].index(self.split[0])]

    def rotation(self) -> jax.Array:
        """`[*batch, blocks, n, n]`, at least float32."""
        size = self._block_size()
        upper = jnp.zeros((*self.q.shape[:-1], size, size), compute_dtype(self.q.dtype))
        upper = upper.at[(..., *np.triu_indices(size, 1))].set(self.q.astype(upper.dtype))
        skew, identity = upper - upper.mT, jnp.broadcast_to(jnp.eye(size, dtype=upper.dtype), upper.shape)
        if not self.terms:
            return jnp.linalg.solve((identity + skew).mT, (identity - skew).mT).mT
        # I + 2Q + 2Q² + … + Qᵏ with k = terms − 1, the last not doubled; 3 terms are the same as 4, as in PEFT.
        terms = max(self.terms, 4) if self.terms > 2 else 2
        total, power = identity, identity
        for number in range(1, terms):
            power = jnp.matmul(power, skew, precision=lax.Precision.HIGHEST)
            total = total + (1.0 if 1 < number == terms - 1 else 2.0) * power
        return total

    def factored(self, weight: jax.Array) -> Factored:
        (axis,), values, rotation = self.split, dequantized(weight), self.rotation()
        size = rotation.shape[-1]
        batch = self.labels("q")[:-2]
        change = Factor(
            rotation - jnp.broadcast_to(jnp.eye(size, dtype=rotation.dtype), rotation.shape),
            (*batch, f"{axis}.0", f"{axis}.1", "rotated"),
        )
        shape, labels = list(values.shape), [str(number) for number in range(values.ndim)]
        shape[axis : axis + 1], labels[axis : axis + 1] = (-1, size), (f"{axis}.0", "rotated")
        return self.form(change, Factor(values.reshape(shape), tuple(labels)))

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        return dataclasses.replace(self, **zeros(self))

    def describe(self) -> dict[str, Any]:
        return {"block_size": self._block_size()}


@dataclasses.dataclass(frozen=True)
class OFT(Recipe):
    r"""Rotates the inputs of a frozen weight by a trained orthogonal matrix of blocks: :math:`R\,W`.

    The largest in axis is divided into blocks.

    Args:
      block_size: The size of a block; divides the in axis.
      terms: None for the Cayley transform :math:`(I - Q)(I + Q)^{-1}`; otherwise the number of terms of the Neumann
        series of :math:`(I + Q)(I - Q)^{-1}`, which needs no inverse and is orthogonal only for small Q (5 in PEFT).
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of the trained entries.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = OFT(block_size=4).create(jax.random.key(0), jnp.ones((16, 32)), ("in", "out"))
      >>> adapter.q.shape, adapter.rotation().shape
      ((4, 6), (4, 4, 4))

    References:
      Qiu et al., `OFT <https://arxiv.org/abs/2306.07280>`_, 2023, §3; `OFTv2 <https://arxiv.org/abs/2506.19847>`_,
      2025, for the rotation of inputs and the series
    """

    block_size: int = 32
    _: dataclasses.KW_ONLY
    terms: int | None = None
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("OFT", "block_size", self.block_size)
        if self.block_size < 2:
            raise ValueError(f"OFT(block_size={self.block_size}): a block of one input does not rotate; at least 2.")
        if self.terms is not None and checks.integer("OFT", "terms", self.terms) < 2:
            raise ValueError(f"OFT(terms={self.terms}): the first term is the identity; at least 2.")
        checks.floating("OFT", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> OFTAdapter:
        del key
        axes = roles.in_and_out("OFT", axes, weight.shape)
        axis, size = roles.largest(weight.shape, axes, IN), self.block_size
        blocks = roles.divided("OFT", "block_size", size, weight.shape, axis)
        parts = [size if number == axis else n for number, n in enumerate(weight.shape)]
        batch = roles.sizes(weight.shape, axes, BATCH)
        return OFTAdapter(
            q=jnp.zeros((*batch, blocks, size * (size - 1) // 2), self.dtype),
            terms=self.terms or 0,
            rest=roles.sizes(parts, axes, IN),
            out=roles.sizes(weight.shape, axes, OUT),
            split=(axis,),
            axes=axes,
        )
