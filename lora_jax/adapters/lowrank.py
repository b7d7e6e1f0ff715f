"""LoRA: a low-rank term beside a frozen weight."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax import checks, initializers
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.matrices import Matrices
from lora_jax.adapters.protocol import (
    BATCH,
    IN,
    LOOKUP,
    OUT,
    Adapter,
    Recipe,
    adapter,
    frozen,
    pad_axis,
    static,
    trained,
)
from lora_jax.initializers import Reading
from lora_jax.leaves import dequantized, is_abstract, is_quantized
from lora_jax.renamed import module_getattr

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
}

BLOCK, RANK = "block", "rank"


@adapter("LoRA")
class LoRAAdapter(Adapter):
    """ΔW[in, out] = scale · Σᵣ a[r, in] · b[r, out], and scale · bias[out] added to the outputs where there is a bias.

    Attributes:
      a: `[*batch, (blocks,) rank, *in]`.
      b: `[*batch, (blocks,) rank, *out]`; the out axis divided by the number of blocks.
      scale: Scalar, or one for each batch element (layer, expert) and block: `[*batch, (blocks,)]` or its leading axes.
      dropout: Scalar; the rate on the input of the low-rank product where a dropout key is given.
      axes: The role of each axis of the weight.
      blocks: Which of the equal parts of the out axis are adapted; `(True,)` for the whole axis. `a` and
        `b` hold the adapted ones only.
      fingerprint: Of the weight, where `prepare` moved a part of it into the factors; see
        :mod:`lora_jax.adapters.fingerprints`.
      bias: `[*batch, (blocks,) *out]`; of the second product, as PEFT's `lora_bias` has it, on a layer that has no bias
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

    @property
    def _rank_axis(self) -> int:
        return self.axes.count(BATCH) + (len(self.blocks) > 1)

    @property
    def rank(self) -> int:
        return self.a.shape[self._rank_axis]

    def pad_rank(self, rank: int) -> Self:
        a, b = (pad_axis(factor, self._rank_axis, rank) for factor in (self.a, self.b))
        return dataclasses.replace(self, a=a, b=b)

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        a, b, fingerprint, bias = jax.tree.map(jnp.zeros_like, (self.a, self.b, self.fingerprint, self.bias))
        return dataclasses.replace(self, a=a, b=b, fingerprint=fingerprint, bias=bias)

    def shape(self) -> tuple[int, ...]:
        lead, skip = self.axes.count(BATCH), self._rank_axis + 1
        out = tuple(size * len(self.blocks) for size in self.b.shape[skip:])
        return roles.assembled(self.axes, batch=self.a.shape[:lead], into=self.a.shape[skip:], out=out)

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        form = self.with_diagonal(self.scale)
        return form if self.bias is None else dataclasses.replace(form, offset=self._offset(self.bias))

    def _offset(self, bias: jax.Array) -> Factor:
        """The scaled bias, with the labels of the batch and out axes."""
        batch, out = (roles.labels(self.axes, role) for role in (BATCH, OUT))
        dtype = compute_dtype(bias.dtype)
        scaled = bias.astype(dtype) * self.scale.astype(dtype).reshape(
            self.scale.shape + (1,) * (bias.ndim - self.scale.ndim)
        )
        return Factor(self._spread_blocks(scaled), (*batch, *((BLOCK,) if len(self.blocks) > 1 else ()), *out))

    def with_diagonal(self, diagonal: jax.Array) -> Factored:
        """The factored form of Σᵣ a[r] · diagonal[r] · b[r].

        What scales the rank is a factor of its own: multiplied into b it would make another b, as large and one more
        for its gradient.

        Args:
          diagonal: `[*batch, (blocks,) rank]`, or its leading axes.
        """
        batch, into, out = (roles.labels(self.axes, role) for role in (BATCH, IN, OUT))
        fused = len(self.blocks) > 1
        lead = (*batch, *((BLOCK,) if fused else ()), RANK)
        shape = self.a.shape[: len(lead)]
        dtype = compute_dtype(self.b.dtype)  # a scale of few bits would be another scale
        diagonal = diagonal.astype(dtype).reshape(diagonal.shape + (1,) * (len(shape) - diagonal.ndim))
        return Factored(
            labels=tuple((BLOCK, str(i)) if fused and role == OUT else (str(i),) for i, role in enumerate(self.axes)),
            factors=(
                Factor(self._spread_blocks(self.a), (*lead, *into)),
                Factor(self._spread_blocks(jnp.broadcast_to(diagonal, shape)), lead),
                Factor(self._spread_blocks(self.b), (*lead, *out)),
            ),
            dropout=self.dropout,
        )

    def _spread_blocks(self, factor: jax.Array) -> jax.Array:
        """Zeros in place of the blocks that are not adapted."""
        if all(self.blocks):
            return factor
        axis = self.axes.count(BATCH)
        kept = iter(jnp.split(factor, sum(self.blocks), axis=axis))
        zero = jnp.zeros((*factor.shape[:axis], 1, *factor.shape[axis + 1 :]), factor.dtype)
        return jnp.concatenate([next(kept) if adapted else zero for adapted in self.blocks], axis=axis)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"rank": self.rank}
        if isinstance(self.scale, jax.Array) and self.scale.ndim == 0:
            scale = float(self.scale)
            described |= {"alpha": scale * self.rank, "scale": scale, "dropout": float(self.dropout)}
        return described


@dataclasses.dataclass(frozen=True)
class LoRA(Recipe):
    r"""A low-rank term beside a frozen weight: :math:`W + s\,A^\top B`.

    Args:
      rank: Of the term; at most the smaller of the weight's in and out sizes.
      alpha: The scale's numerator; None makes the scale 1.
      axes: The role of each axis of the weight ('batch', 'in', 'out'); None takes them from the trace.
      blocks: Splits the out axis into that many equal parts with factors of their own, as fused qkv
        kernels and grouped convolutions need. A tuple of booleans adapts only the parts that are True
        (loralib's `enable_lora`).
      scaling: 'alpha/r', or 'alpha/sqrt(r)' for rsLoRA.
      init: 'kaiming_uniform' (a uniform, b zero; lookups get a zero, b normal), another name of
        :mod:`lora_jax.initializers`, or an `Initializer`. Those that read data or move a part of the weight
        into the factors go through :func:`lora_jax.prepare`.
      dropout: Rate on the input of the low-rank product, where `adapted` is given a `dropout_key`.
      dtype: Of the factors.

    Raises:
      ValueError: The rank or the blocks are not positive integers; alpha or the scale that it makes is zero, not finite
        or beyond float32; the dropout is not in [0, 1); a name is unknown; the dtype is not one of floats.
      TypeError: alpha or the dropout is not a number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> made = LoRA(rank=4, alpha=8).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> made.a.shape, made.b.shape, float(made.scale)
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
        return self._make(key, weight, axes, moves=False)[1]

    def prepare(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, LoRAAdapter]:
        """The weight without the part that the initializer moved into the factors, and the adapter."""
        return self._make(key, weight, axes, moves=True)

    @property
    def reads(self) -> str | None:  # pyrefly: ignore[bad-override]
        return initializers.get_initializer(self.init).reads

    def with_calibration(self, readings: Mapping[str, Reading]) -> dict[str, Recipe | None]:
        initializer = initializers.get_initializer(self.init)
        split = {path: self._matrices(reading.shape, reading.axes) for path, reading in readings.items()}
        limits = {path: min(matrices.fan_in, matrices.fan_out) for path, matrices in split.items()}
        ranks = initializer.distributed(self.rank, readings, limits, sum(self._block_mask()))
        recipes: dict[str, Recipe | None] = {}
        for path, found in readings.items():
            own = None if ranks is None else ranks[path]
            rank = self.rank if own is None else max(own)
            if rank == 0:
                recipes[path] = None
                continue
            recipes[path] = dataclasses.replace(
                self,
                rank=rank,
                # The scale is that of the recipe, whatever the rank.
                alpha=None if self.alpha is None else self.scale() / SCALINGS[self.scaling](1.0, rank),
                init=initializers.Calibrated(initializer, found, own),
            )
        return recipes

    def _make(self, key, weight, axes, moves: bool) -> tuple[jax.Array, LoRAAdapter]:
        initializer = initializers.get_initializer(self.init)
        if initializer.reads or (initializer.moves_weight and not moves):
            does = (
                f"reads the {initializer.reads}" if initializer.reads else "moves a part of the weight into its factors"
            )
            raise ValueError(
                f"{self._name}(init={self.init!r}) {does}: use "
                "base, delta = lora_jax.prepare(key, base, spec, fn, batches)."
            )
        if initializer.moves_weight and is_abstract(weight):
            raise ValueError(f"{self._name}(init={self.init!r}) reads the weight; the base has its shape only.")
        scale = self.scale()
        if initializer.moves_weight and scale <= 0:
            raise ValueError(f"{self._name}(alpha={self.alpha}, init={self.init!r}) divides by a positive scale.")
        matrices = self._matrices(weight.shape, axes)

        def term(a: jax.Array, b: jax.Array, scale: float) -> LoRAAdapter:
            return LoRAAdapter(
                a=a.reshape(*matrices.batch, self.rank, *matrices.into).astype(self.dtype),
                b=b.reshape(*matrices.batch, self.rank, *matrices.out).astype(self.dtype),
                scale=jnp.asarray(scale, jnp.float32),
                dropout=jnp.asarray(self.dropout, jnp.float32),
                axes=matrices.axes,
                blocks=matrices.blocks,
            )

        start = initializer.start(
            initializers.Given(
                key=key,
                batch=math.prod(matrices.batch),
                rank=self.rank,
                fan_in=matrices.fan_in,
                fan_out=matrices.fan_out,
                lookup=LOOKUP in axes,
                scale=scale,
                leaf=weight,
                matrices=matrices.of,
                axes=axes,
                without=lambda a, b: term(a, b, -scale).merge(dequantized(weight)),
            )
        )
        moved = weight if start.leaf is None else start.leaf
        if is_quantized(weight) and not is_quantized(moved):
            moved = weight.requantized(moved)
        return moved, term(start.a, start.b, scale)

    def _matrices(self, shape: Sequence[int], axes: Sequence[str]) -> Matrices:
        """The weight as matrices; raises where it has none of this rank."""
        name = self._name
        axes = roles.in_and_out(name, axes, shape)
        batch, into, out = (roles.sizes(shape, axes, role) for role in (BATCH, IN, OUT))
        mask = self._block_mask()
        if len(mask) > 1:
            if len(out) != 1 or out[0] % len(mask):
                raise ValueError(
                    f"{name}(blocks={self.blocks!r}) splits the only out axis into {len(mask)} equal parts; the "
                    f"weight of shape {tuple(shape)} has out axes of sizes {out}. An axis that counts the "
                    "parts can be declared 'batch' by axes=."
                )
            batch, out = (*batch, sum(mask)), (out[0] // len(mask),)
        found = Matrices(axes=axes, blocks=mask, batch=batch, into=into, out=out)
        limit = min(found.fan_in, found.fan_out)
        if self.rank > limit:
            raise ValueError(
                f"{name}(rank={self.rank}) is above the rank of the weight: shape {tuple(shape)} with roles "
                f"{axes} is at most of rank {limit}."
            )
        return found


__getattr__ = module_getattr(__name__, LowRank="LoRAAdapter")
