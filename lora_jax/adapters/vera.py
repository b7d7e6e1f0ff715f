"""VeRA: one frozen random pair for all weights of a size, and trained vectors; DVoRA decomposes it like DoRA."""

import dataclasses
import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.dora import NORM_OVER, Decomposed, magnitude_of
from lora_jax.adapters.factored import Factor, Factored, compute_dtype
from lora_jax.adapters.layouts import BATCH, IN, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.renamed import module_getattr

_SHARED: weakref.WeakValueDictionary[tuple, jax.Array] = weakref.WeakValueDictionary()


def shared(seed: int, part: int, shape: tuple[int, ...], fan: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Random numbers U(±√(6/fan)): one array for all calls with the same arguments, while it is referenced."""
    # An array made under a mesh with explicit axes has a type of its own.
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
      dropout: Scalar; the rate on the input of the low-rank product if a dropout key is passed.
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

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        dtype = compute_dtype(self.g.dtype)  # in few bits a scale would be rounded
        g = Factor(self.g.astype(dtype) * self.scale.astype(dtype), self.labels("g"))
        return self.form(self.factor("a"), self.factor("d"), self.factor("b"), g, dropout=self.dropout)

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}


@adapter("DVoRA")
class DVoRAAdapter(Decomposed, VeRAAdapter):
    """VeRA on the direction of the weight, with a trained magnitude, as in DoRA."""


@dataclasses.dataclass(frozen=True)
class VeRA(Recipe):
    r"""Trains two vectors beside a frozen random pair: :math:`W + A^\top\,\mathrm{diag}(d)\,B\,\mathrm{diag}(g)`.

    Args:
      rank: The rank of the pair; may be above the weight's.
      seed: The seed of the pair. Weights of one size share the pair, in memory (until a transformation copies the
        delta) and on disk.
      d: What the vector d starts from; g starts from zero.
      axes: The role of each axis of the weight; None takes them from the trace.
      dropout: Rate on the input of the low-rank product, if `adapted` is passed a `dropout_key`.
      dtype: The dtype of the vectors and the pair.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = VeRA(rank=64).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.d.shape, adapter.g.shape, adapter.a.shape
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
        batch, in_sizes, out = (roles.sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT))
        fields = {
            "d": jnp.full((*batch, self.rank), self.d, self.dtype),
            "g": jnp.zeros((*batch, *out), self.dtype),
            "a": shared(self.seed, 0, (self.rank, *in_sizes), math.prod(in_sizes), self.dtype),
            "b": shared(self.seed, 1, (self.rank, *out), self.rank, self.dtype),
            "scale": jnp.ones((), jnp.float32),
            "dropout": jnp.asarray(self.dropout, jnp.float32),
            "axes": axes,
        }
        return self._adapter(fields, weight)

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> VeRAAdapter:
        """The adapter with the fields of a :class:`VeRAAdapter`, for a weight."""
        del weight
        return VeRAAdapter(**fields)


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

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> DVoRAAdapter:
        term = VeRAAdapter(**fields)
        magnitude = magnitude_of("DVoRA", term, term.factored(weight), weight, self.norm_over)
        return DVoRAAdapter(**fields, magnitude=magnitude, norm_over=self.norm_over, norm_gradient=self.norm_gradient)


__getattr__ = module_getattr(__name__, ScaledPair="VeRAAdapter", DecomposedPair="DVoRAAdapter")
