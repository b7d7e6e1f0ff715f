"""VeRA: one frozen random pair for all weights of a size, and trained vectors; DVoRA decomposes it like DoRA."""

import dataclasses
import math
import weakref
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.dora import NORM_OVER, decomposed, magnitude_of
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.protocol import (
    BATCH,
    IN,
    OUT,
    Adapter,
    Recipe,
    adapter,
    frozen,
    needed,
    pad_axis,
    static,
    trained,
)
from lora_jax.renamed import module_getattr

_SHARED: weakref.WeakValueDictionary[tuple, jax.Array] = weakref.WeakValueDictionary()


def shared(seed: int, part: int, shape: tuple[int, ...], fan: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Random numbers U(±√(6/fan)): one array for all who ask for the same, as long as one of them lives."""
    # What is made under a mesh with explicit axes lies there and has another type.
    name = (seed, part, shape, fan, jnp.dtype(dtype), jax.sharding.get_abstract_mesh())
    array = _SHARED.get(name)
    if array is None:
        key, bound = jax.random.fold_in(jax.random.key(seed), part), (6.0 / fan) ** 0.5
        array = jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
        if not isinstance(array, jax.core.Tracer):
            _SHARED[name] = array
    return array


@adapter("VeRA")
class VeRAAdapter(Adapter):
    """ΔW[i, o] = scale · Σᵣ a[r, i] · d[r] · b[r, o] · g[o].

    Attributes:
      d: `[*batch, rank]`; scales the rank.
      g: `[*batch, *out]`; scales the outputs.
      a: `[rank, *in]`, frozen; the same array in all adapters of one seed, rank and size.
      b: `[rank, *out]`, likewise.
      scale: Scalar.
      dropout: Scalar; the rate on the input of the low-rank product where a dropout key is given.
      axes: The role of each axis of the weight.
    """

    d: jax.Array = trained("batch rank", vector=True)
    g: jax.Array = trained("batch out", vector=True)
    a: jax.Array = frozen("rank in")
    b: jax.Array = frozen("rank out")
    scale: jax.Array = frozen("scalar")
    dropout: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    additive = True

    def shape(self) -> tuple[int, ...]:
        return roles.assembled(self.axes, batch=self.d.shape[:-1], into=self.a.shape[1:], out=self.b.shape[1:])

    def factored(self, weight: jax.Array) -> Factored:
        batch, into, out = (roles.labels(self.axes, role) for role in (BATCH, IN, OUT))
        dtype = compute_dtype(self.g.dtype)  # a scale of few bits would be another scale
        return Factored(
            labels=tuple((str(axis),) for axis in range(weight.ndim)),
            factors=(
                Factor(self.a, ("rank", *into)),
                Factor(self.d, (*batch, "rank")),
                Factor(self.b, ("rank", *out)),
                Factor(self.g.astype(dtype) * self.scale.astype(dtype), (*batch, *out)),
            ),
            dropout=self.dropout,
        )

    @property
    def rank(self) -> int:
        return self.d.shape[-1]

    def pad_rank(self, rank: int) -> Self:
        axis = self.d.ndim - 1
        return dataclasses.replace(
            self, d=pad_axis(self.d, axis, rank), a=pad_axis(self.a, 0, rank), b=pad_axis(self.b, 0, rank)
        )

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        return dataclasses.replace(self, g=jnp.zeros_like(self.g))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@adapter("DVoRA")
class DVoRAAdapter(VeRAAdapter):
    """The same on the direction of the weight, with a trained magnitude, as in DoRA.

    Attributes:
      magnitude: `[*batch, *out]`, or `[*batch, *in]` where the norm is over the out axes.
      norm_over: The axes that a norm is taken over, 'in' or 'out'.
      norm_gradient: Whether gradients flow through the norm.
    """

    magnitude: jax.Array = trained("batch kept", vector=True)
    norm_over: str = static(choices=NORM_OVER)
    norm_gradient: bool = static()

    additive = False

    def layout(self, name: str) -> str:
        return super().layout(name).replace("kept", OUT if self.norm_over == IN else IN)

    def factored(self, weight: jax.Array) -> Factored:
        form = super().factored(weight)
        return decomposed(form, weight, self.axes, self.magnitude, self.norm_over, self.norm_gradient)

    def identity_like(self, weight: jax.Array | None) -> Self:
        zero = super().identity_like(weight)
        magnitude = magnitude_of(self.kind, zero, needed(weight, self.kind), self.norm_over)
        return dataclasses.replace(zero, magnitude=magnitude.astype(self.magnitude.dtype))


@dataclasses.dataclass(frozen=True)
class VeRA(Recipe):
    r"""Trains two vectors beside a frozen random pair: :math:`W + A^\top\,\mathrm{diag}(d)\,B\,\mathrm{diag}(g)`.

    Args:
      rank: Of the pair; may be above the weight's.
      seed: Of the pair. Weights of one size share it, in memory (until a transformation copies the delta) and on disk.
      d: What the vector d starts from; g starts from zero.
      axes: The role of each axis of the weight; None takes them from the trace.
      dropout: Rate on the input of the low-rank product, where `adapted` is given a `dropout_key`.
      dtype: Of the vectors and the pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> made = VeRA(rank=64).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> made.d.shape, made.g.shape, made.a.shape
      ((64,), (32,), (64, 16))

    References:
      Kopiczko et al., `VeRA <https://arxiv.org/abs/2310.11454>`_, 2023, §3
    """

    rank: int
    _: dataclasses.KW_ONLY
    seed: int = 0
    d: float = 0.1
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        name = type(self).__name__
        checks.positive(name, "rank", self.rank)
        checks.integer(name, "seed", self.seed)
        checks.finite(name, "d", self.d, nonzero=True)
        checks.rate(name, "dropout", self.dropout)
        checks.floating(name, self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> VeRAAdapter:
        del key
        axes = roles.in_and_out(type(self).__name__, axes, weight.shape)
        batch, into, out = (roles.sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT))
        return VeRAAdapter(
            d=jnp.full((*batch, self.rank), self.d, self.dtype),
            g=jnp.zeros((*batch, *out), self.dtype),
            a=shared(self.seed, 0, (self.rank, *into), math.prod(into), self.dtype),
            b=shared(self.seed, 1, (self.rank, *out), self.rank, self.dtype),
            scale=jnp.ones((), jnp.float32),
            dropout=jnp.asarray(self.dropout, jnp.float32),
            axes=axes,
        )


@dataclasses.dataclass(frozen=True)
class DVoRA(VeRA):
    r"""VeRA on the direction of a weight, with a trained magnitude: DoRA with VeRA's vectors.

    Takes what :class:`VeRA` takes, and:

    Args:
      norm_over: The axes that a norm is taken over, as for :class:`lora_jax.DoRA`.
      norm_gradient: Whether gradients flow through the norm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> DVoRA(rank=64).create(jax.random.key(0), jnp.full((4, 8), 2.0), ("in", "out")).magnitude.tolist()[:2]
      [4.0, 4.0]

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §5.4
    """

    norm_over: str = IN
    norm_gradient: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.one_of("DVoRA", "norm_over", self.norm_over, NORM_OVER)
        checks.flag("DVoRA", "norm_gradient", self.norm_gradient)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> DVoRAAdapter:
        pair = super().create(key, weight, axes)
        fields = {field.name: getattr(pair, field.name) for field in dataclasses.fields(pair)}
        magnitude = magnitude_of("DVoRA", pair, weight, self.norm_over)
        return DVoRAAdapter(**fields, magnitude=magnitude, norm_over=self.norm_over, norm_gradient=self.norm_gradient)


__getattr__ = module_getattr(__name__, ScaledPair="VeRAAdapter", DecomposedPair="DVoRAAdapter")
