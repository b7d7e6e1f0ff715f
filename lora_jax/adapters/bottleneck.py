"""Bottleneck adapters: a small network after a layer, whose result is added to the layer's output."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, chain, compute_dtype, plus, times
from lora_jax.adapters.layouts import BATCH, IN, LOOKUP, OUT, zeros
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, static, trained

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""By name. Each is zero at zero, so that a hidden entry that a stack adds as padding contributes nothing."""

EPSILON = 1e-5
"""Added to the variance by the layer normalization."""


@adapter("Bottleneck")
class BottleneckAdapter(Adapter):
    """The output y of a layer, after its bias, becomes y + up(activation(down(norm(y)))).

    Attributes:
      down: `[*batch, rank, *out]`; the rank is the size of the bottleneck.
      down_bias: `[*batch, rank]`.
      up: `[*batch, rank, *out]`.
      up_bias: `[*batch, *out]`.
      norm_scale: `[*batch, *out]`; of a layer normalization, None for none.
      norm_bias: Likewise.
      inputs: The sizes of the weight's in axes.
      activation: A name in :data:`ACTIVATIONS`.
      norm: Whether there is a layer normalization.
      axes: The role of each axis of the weight.
    """

    down: jax.Array = trained("batch rank out")
    down_bias: jax.Array = trained("batch rank", vector=True)
    up: jax.Array = trained("batch rank out")
    up_bias: jax.Array = trained("batch out", vector=True)
    inputs: tuple[int, ...] = static("in")
    activation: str = static(choices=tuple(ACTIVATIONS))
    norm: bool = static()
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]
    norm_scale: jax.Array | None = trained("batch out", vector=True, default=None, kw_only=True)
    norm_bias: jax.Array | None = trained("batch out", vector=True, default=None, kw_only=True)

    nonlinear = True

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        function = BottleneckFunction(
            down=self.factor("down"),
            down_bias=self.factor("down_bias"),
            up=self.factor("up"),
            up_bias=self.factor("up_bias"),
            norm=(self.factor("norm_scale"), self.factor("norm_bias")) if self.norm else None,
            activation=self.activation,
        )
        return self.form(on_output=function)

    def find_inconsistency(self) -> str | None:
        arrays = [name for name in ("norm_scale", "norm_bias") if getattr(self, name) is not None]
        if len(arrays) == 2 * self.norm:
            return None
        return f"norm is {self.norm}, and the arrays of a layer normalization are {arrays}."

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        return dataclasses.replace(self, **zeros(self))

    def describe(self) -> dict[str, Any]:
        return {"size": self.rank, "activation": self.activation} | ({"norm": True} if self.norm else {})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BottleneckFunction:
    """up(activation(down(norm(y)))), with biases; see :class:`lora_jax.adapters.factored.OnOutput`."""

    down: Factor
    down_bias: Factor
    up: Factor
    up_bias: Factor
    norm: tuple[Factor, Factor] | None
    activation: str = dataclasses.field(metadata={"static": True})

    @property
    def description(self) -> str:
        return f"y + up({self.activation}(down({'y' if self.norm is None else 'norm(y)'})))"

    def __call__(self, y: Factor, precision: Any) -> Factor:
        features = [label for label in self.up_bias.labels if label not in self.down_bias.labels]
        if self.norm is not None:
            y = _normalized(y, features, *self.norm)
        pairs = list(y.sizes.items())
        hidden_pairs = [pair for pair in pairs if pair[0] not in features]
        hidden_pairs += [pair for pair in self.down_bias.sizes.items() if pair not in hidden_pairs]
        hidden = plus(chain(y, [self.down], hidden_pairs, precision=precision), self.down_bias, hidden_pairs)
        active = Factor(ACTIVATIONS[self.activation](hidden), tuple(label for label, _ in hidden_pairs))
        return Factor(plus(chain(active, [self.up], pairs, precision=precision), self.up_bias, pairs), y.labels)


def _normalized(y: Factor, features: Sequence[str], scale: Factor, bias: Factor) -> Factor:
    """The layer normalization of an output over its features, computed in at least float32."""
    pairs, axes = list(y.sizes.items()), [y.axis(label) for label in features]
    wide = y.array.astype(compute_dtype(y.array.dtype))
    centered = wide - jnp.mean(wide, axis=axes, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=axes, keepdims=True)
    normalized = plus(times(centered * lax.rsqrt(variance + EPSILON), scale, pairs), bias, pairs)
    return Factor(normalized.astype(y.array.dtype), y.labels)


@dataclasses.dataclass(frozen=True)
class Bottleneck(Recipe):
    r"""A bottleneck after a layer: its output y becomes :math:`y + U\,\sigma(D\,y + c) + e`.

    The output is that of the product with the weight, after the bias if one is added to it: parameters that are the
    same for all tokens. What is added next (a residual) is added to the new output. Where the adapters are is the spec:
    after the output projections of attention and the feed-forward layer (Houlsby), or after the latter only (Lin,
    Pfeiffer). The function is not linear, so no merged weight holds it, and :func:`lora_jax.merge` refuses it.

    Training starts from the base's outputs, and as LoRA's factors do: `down` is uniform in ±1/√d, all else zero.
    (Houlsby et al. start near the identity, from truncated normal numbers with a standard deviation of 0.01.)

    Args:
      size: The size of the bottleneck.
      activation: 'relu', 'gelu', 'gelu_tanh', 'silu', 'swish' or 'tanh'. 'swish' is 'silu'.
      norm: Whether a trained layer normalization comes first: :math:`y + U\,\sigma(D\,\mathrm{LN}(y) + c) + e`.
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of all arrays.

    Raises:
      ValueError: The size is not a positive integer; the activation is unknown; the dtype is not one of floats. (From
        `init`:) the weight is indexed, or has no in or no out axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = Bottleneck(4, "gelu").create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.down.shape, adapter.up.shape, sum(leaf.size for leaf in jax.tree.leaves(adapter))
      ((4, 32), (4, 32), 292)

    References:
      Houlsby et al., `Adapters <https://arxiv.org/abs/1902.00751>`_, 2019, §2.1; Lin et al.,
      `Versatile generation <https://arxiv.org/abs/2004.03829>`_, 2020, for the normalization; Hu et al.,
      `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1 for the start from zero, §5.1 for the number of parameters
    """

    size: int
    activation: str = "relu"
    _: dataclasses.KW_ONLY
    norm: bool = False
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.positive("Bottleneck", "size", self.size)
        checks.one_of("Bottleneck", "activation", self.activation, tuple(ACTIVATIONS))
        checks.flag("Bottleneck", "norm", self.norm)
        checks.floating("Bottleneck", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> BottleneckAdapter:
        axes_in_use = roles.in_and_out("Bottleneck", axes, weight.shape)
        if LOOKUP in axes:
            raise ValueError(
                f"Bottleneck acts on the output of a product; axis {axes.index(LOOKUP)} of this weight of shape "
                f"{tuple(weight.shape)} is indexed. Adapt the layer after the lookup, or the table by LoRA(rank)."
            )
        batch, inputs, outputs = (roles.sizes(weight.shape, axes_in_use, role) for role in (BATCH, IN, OUT))
        shape, bound = (*batch, self.size, *outputs), math.prod(outputs) ** -0.5
        norm_arrays = {"norm_scale": jnp.ones, "norm_bias": jnp.zeros} if self.norm else {}
        return BottleneckAdapter(
            down=jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(self.dtype),
            down_bias=jnp.zeros((*batch, self.size), self.dtype),
            up=jnp.zeros(shape, self.dtype),
            up_bias=jnp.zeros((*batch, *outputs), self.dtype),
            inputs=inputs,
            activation=self.activation,
            norm=self.norm,
            axes=axes_in_use,
            **{name: fill((*batch, *outputs), self.dtype) for name, fill in norm_arrays.items()},
        )
