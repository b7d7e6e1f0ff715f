"""LoRA: a low-rank term beside a frozen weight."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks, initializers
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, BLOCK, IN, LOOKUP, OUT, RANK
from lora_jax.adapters.matrices import Matrices
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.initializers import Statistics
from lora_jax.leaves import align_leading, dequantized, is_abstract, is_quantized
from lora_jax.renamed import module_getattr

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}


@adapter("LoRA", sizes=("sketch",))
class LoRAAdapter(Adapter):
    """ΔW[in, out] = scale · Σᵣ a[r, in] · b[r, out]; a bias adds scale · bias[out] to the outputs.

    Attributes:
      a: `[*batch, (blocks,) rank, *in]`.
      b: `[*batch, (blocks,) rank, *out]`; the out axis divided by the number of blocks.
      scale: Scalar, or one for each batch element (layer, expert) and block: `[*batch, (blocks,)]` or its leading axes.
      dropout: Scalar; the rate on the input of the low-rank product if a dropout key is passed.
      axes: The role of each axis of the weight.
      blocks: Which of the equal parts of the out axis are adapted; `(True,)` for the whole axis. `a` and
        `b` hold the adapted ones only.
      fingerprint: The fingerprint of the weight, if `prepare` moved a part of it into the factors; see
        :mod:`lora_jax.adapters.fingerprints`.
      bias: `[*batch, (blocks,) *out]`; of the second product, like PEFT's `lora_bias`, on a layer that has no bias
        of its own; None for none. An adapter with one is not merged.
    """

    a: jax.Array = trained("batch block rank in")
    b: jax.Array = trained("batch block rank out")
    scale: jax.Array = frozen("batch block", leading=True)
    dropout: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]
    blocks: tuple[bool, ...] = static()
    fingerprint: jax.Array | None = frozen("sketch", default=None, kw_only=True)
    bias: jax.Array | None = trained("batch block out", vector=True, default=None, kw_only=True)

    additive = True

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        form = low_rank_form(self, self.scale)
        return form if self.bias is None else dataclasses.replace(form, offset=self._offset(self.bias))

    def _offset(self, bias: jax.Array) -> Factor:
        """The scaled bias, with the labels of the batch and out axes."""
        dtype = compute_dtype(bias.dtype)
        scaled = bias.astype(dtype) * align_leading(self.scale.astype(dtype), bias.ndim)
        return _spread_blocks(self, Factor(scaled, self.labels("bias")))

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"rank": self.rank}
        if isinstance(self.scale, jax.Array) and self.scale.ndim == 0:
            scale = float(self.scale)
            described |= {"alpha": scale * self.rank, "scale": scale, "dropout": float(self.dropout)}
        return described


def low_rank_form(node: Any, diagonal: jax.Array) -> Factored:
    """The factored form of Σᵣ a[r] · diagonal[r] · b[r].

    The diagonal is a factor of its own: multiplied into b it would make another b, as large and one more for its
    gradient.

    Args:
      node: An adapter with the fields `a`, `b`, `blocks` and `dropout` of :class:`LoRAAdapter`.
      diagonal: `[*batch, (blocks,) rank]`, or its leading axes.
    """
    a, b = node.factor("a"), node.factor("b")
    lead = a.labels[: a.labels.index(RANK) + 1]
    dtype = compute_dtype(node.b.dtype)  # in few bits a scale would be rounded
    diagonal = jnp.broadcast_to(align_leading(diagonal.astype(dtype), len(lead)), node.a.shape[: len(lead)])
    factors = (_spread_blocks(node, factor) for factor in (a, Factor(diagonal, lead), b))
    return node.form(*factors, dropout=node.dropout)


def _spread_blocks(node: Any, factor: Factor) -> Factor:
    """The factor with zeros for the blocks that are not adapted."""
    if all(node.blocks):
        return factor
    axis, array = factor.axis(BLOCK), factor.array
    adapted = iter(jnp.split(array, sum(node.blocks), axis=axis))
    zero = jnp.zeros((*array.shape[:axis], 1, *array.shape[axis + 1 :]), array.dtype)
    parts = [next(adapted) if is_adapted else zero for is_adapted in node.blocks]
    return Factor(jnp.concatenate(parts, axis=axis), factor.labels)


@dataclasses.dataclass(frozen=True)
class LoRA(Recipe):
    r"""A low-rank term beside a frozen weight: :math:`W + s\,A^\top B`.

    Args:
      rank: The rank of the term; at most the smaller of the weight's in and out sizes.
      alpha: The scale's numerator; None makes the scale 1.
      axes: The role of each axis of the weight ('batch', 'in', 'out'); None takes them from the trace.
      blocks: Splits the out axis into that many equal parts with factors of their own, as fused qkv
        kernels and grouped convolutions need. A tuple of booleans adapts only the parts that are True
        (loralib's `enable_lora`).
      scaling: 'alpha/r', or 'alpha/sqrt(r)' for rsLoRA.
      init: 'kaiming_uniform' (a uniform, b zero; lookups get a zero, b normal), another name of
        :mod:`lora_jax.initializers`, or an `Initializer`. Those that read data or move a part of the weight
        into the factors go through :func:`lora_jax.prepare`.
      dropout: Rate on the input of the low-rank product, if `adapted` is passed a `dropout_key`.
      dtype: The dtype of the factors.

    Raises:
      ValueError: The rank or the blocks are not positive integers; alpha or the scale that it makes is zero, not finite
        or beyond float32; the dropout is not in [0, 1); a name is unknown; the dtype is not one of floats.
      TypeError: alpha or the dropout is not a number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = LoRA(rank=4, alpha=8).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.a.shape, adapter.b.shape, float(adapter.scale)
      ((4, 16), (4, 32), 2.0)

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1; Kalajdzievski,
      `rsLoRA <https://arxiv.org/abs/2312.03732>`_, 2023, for the square root.
    """

    rank: int
    alpha: float | None = None
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    blocks: int | tuple[bool, ...] = 1
    scaling: str = "alpha/r"
    init: str | initializers.Initializer = "kaiming_uniform"
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def _name(self) -> str:
        return type(self).__name__

    def __post_init__(self):
        checks.positive(self._name, "rank", self.rank)
        checks.one_of(self._name, "scaling", self.scaling, tuple(SCALINGS))
        checks.scaling(self._name, self.alpha, self.scale)
        checks.rate(self._name, "dropout", self.dropout)
        checks.floating(self._name, self.dtype)
        checks.blocks(self._name, self.blocks)
        initializers.get_initializer(self.init)

    def _block_mask(self) -> tuple[bool, ...]:
        return tuple(map(bool, self.blocks)) if isinstance(self.blocks, Sequence) else (True,) * self.blocks

    def scale(self) -> float:
        """The number that multiplies a·b."""
        return 1.0 if self.alpha is None else SCALINGS[self.scaling](self.alpha, self.rank)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> LoRAAdapter:
        """A new adapter whose term is zero (for initializers that are)."""
        return self._create(key, weight, axes, moves=False)[1]

    def prepare(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, LoRAAdapter]:
        """The weight without the part that the initializer moved into the factors, and the adapter."""
        return self._create(key, weight, axes, moves=True)

    @property
    def reads(self) -> str | None:  # pyrefly: ignore[bad-override]
        return initializers.get_initializer(self.init).reads

    def with_calibration(self, statistics: Mapping[str, Statistics]) -> dict[str, Recipe | None]:
        initializer = initializers.get_initializer(self.init)
        split = {path: self._matrices(stats.shape, stats.axes) for path, stats in statistics.items()}
        limits = {path: min(matrices.fan_in, matrices.fan_out) for path, matrices in split.items()}
        ranks = initializer.allocate_ranks(self.rank, statistics, limits, sum(self._block_mask()))
        recipes: dict[str, Recipe | None] = {}
        for path, stats in statistics.items():
            matrix_ranks = None if ranks is None else ranks[path]
            rank = self.rank if matrix_ranks is None else max(matrix_ranks)
            if rank == 0:
                recipes[path] = None
                continue
            recipes[path] = dataclasses.replace(
                self,
                rank=rank,
                # The scale is that of the recipe, whatever the rank.
                alpha=None if self.alpha is None else self.scale() / SCALINGS[self.scaling](1.0, rank),
                init=initializers.Calibrated(initializer, stats, matrix_ranks),
            )
        return recipes

    def _create(self, key, weight, axes, moves: bool) -> tuple[jax.Array, LoRAAdapter]:
        initializer = initializers.get_initializer(self.init)
        if initializer.reads or (initializer.moves_weight and not moves):
            requirement = (
                f"reads the {initializer.reads}" if initializer.reads else "moves a part of the weight into its factors"
            )
            raise ValueError(
                f"{self._name}(init={self.init!r}) {requirement}: use "
                "base, delta = lora_jax.prepare(key, base, spec, fn, batches)."
            )
        if initializer.moves_weight and is_abstract(weight):
            raise ValueError(f"{self._name}(init={self.init!r}) reads the weight; the base has its shape only.")
        scale = self.scale()
        if initializer.moves_weight and scale <= 0:
            raise ValueError(f"{self._name}(alpha={self.alpha}, init={self.init!r}) divides by a positive scale.")
        matrices = self._matrices(weight.shape, axes)

        def fields(a: jax.Array, b: jax.Array, scale: float) -> dict[str, Any]:
            return {
                "a": a.reshape(*matrices.batch, self.rank, *matrices.in_sizes).astype(self.dtype),
                "b": b.reshape(*matrices.batch, self.rank, *matrices.out_sizes).astype(self.dtype),
                "scale": jnp.asarray(scale, jnp.float32),
                "dropout": jnp.asarray(self.dropout, jnp.float32),
                "axes": matrices.axes,
                "blocks": matrices.blocks,
            }

        factors = initializer.make_factors(
            initializers.Target(
                key=key,
                batch=math.prod(matrices.batch),
                rank=self.rank,
                fan_in=matrices.fan_in,
                fan_out=matrices.fan_out,
                lookup=LOOKUP in axes,
                scale=scale,
                leaf=weight,
                matrices=matrices.from_weight,
                axes=axes,
                residual=lambda a, b: LoRAAdapter(**fields(a, b, -scale)).merge(dequantized(weight)),
            )
        )
        residual = weight if factors.leaf is None else factors.leaf
        if is_quantized(weight) and not is_quantized(residual):
            residual = weight.requantized(residual)
        return residual, self._adapter(fields(factors.a, factors.b, scale), residual)

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> Any:
        """The adapter with the fields of a :class:`LoRAAdapter`, for the weight that remains in the base."""
        del weight
        return LoRAAdapter(**fields)

    def _matrices(self, shape: Sequence[int], axes: Sequence[str]) -> Matrices:
        """Returns the weight as matrices; raises `ValueError` if its rank is below the requested one."""
        name = self._name
        axes = roles.in_and_out(name, axes, shape)
        batch, in_sizes, out = (roles.sizes(shape, axes, role) for role in (BATCH, IN, OUT))
        mask = self._block_mask()
        if len(mask) > 1:
            if len(out) != 1 or out[0] % len(mask):
                raise ValueError(
                    f"{name}(blocks={self.blocks!r}) splits the only out axis into {len(mask)} equal parts; the "
                    f"weight of shape {tuple(shape)} has out axes of sizes {out}. An axis that counts the "
                    "parts can be declared 'batch' by axes=."
                )
            batch, out = (*batch, sum(mask)), (out[0] // len(mask),)
        matrices = Matrices(axes=axes, blocks=mask, batch=batch, in_sizes=in_sizes, out_sizes=out)
        roles.check_rank(name, self.rank, shape, axes, blocks=len(mask))
        return matrices


__getattr__ = module_getattr(__name__, LowRank="LoRAAdapter")
