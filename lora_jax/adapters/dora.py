"""DoRA: a low-rank term for the direction of each output's weights, a trained magnitude beside it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factor, Factored, chain, compute_dtype, folded
from lora_jax.adapters.layouts import BATCH, IN, OUT, zeros
from lora_jax.adapters.lowrank import LoRA, LoRAAdapter
from lora_jax.adapters.protocol import Adapter, adapter, check_weight, static, trained
from lora_jax.leaves import apply_dequantized, is_abstract, is_quantized
from lora_jax.renamed import module_getattr

NORM_OVER = (IN, OUT)


@dataclasses.dataclass(frozen=True, repr=False)
class Decomposed(Adapter):
    """Decomposes the weight that another class of adapter makes: W' = magnitude / ‖V‖ · V, where V is that weight.

    It comes before the other class: `class DoRAAdapter(Decomposed, LoRAAdapter)`.

    Attributes:
      magnitude: `[*batch, *out]` if the norm is over the in axes, `[*batch, *in]` if it is over the out axes.
      norm_over: The axes that a norm is taken over, 'in' or 'out'.
      norm_gradient: Whether gradients flow through ‖V‖.
    """

    magnitude: jax.Array = trained("batch ~norm_over", vector=True)  # noqa: RUF009 (declares a field)
    norm_over: str = static(choices=NORM_OVER)
    norm_gradient: bool = static()

    additive = False

    def factored(self, weight: jax.Array) -> Factored | None:
        form = super().factored(weight)
        if form is None:
            return None
        return decomposed(form, weight, self.axes, self.magnitude, self.norm_over, self.norm_gradient)

    def identity_like(self, weight: jax.Array | None) -> Self:
        weight = check_weight(weight, self.kind)
        node = dataclasses.replace(self, **zeros(self))
        form = super(Decomposed, node).factored(weight)
        assert form is not None
        magnitude = magnitude_of(self.kind, node, form, weight, self.norm_over)
        return dataclasses.replace(node, magnitude=magnitude.astype(self.magnitude.dtype))


@adapter("DoRA")
class DoRAAdapter(Decomposed, LoRAAdapter):
    """W' = magnitude / ‖V‖ · V with V = W + scale · Σᵣ a[r] · b[r], a norm for each output (or input)."""

    def find_inconsistency(self) -> str | None:
        return None if self.bias is None else "DoRA has no bias; LoRA and LoRA-FA have one."


def decomposed(
    form: Factored, weight: jax.Array, axes: Sequence[str], magnitude: jax.Array, norm_over: str, norm_gradient: bool
) -> Factored:
    """The factored form of a weight, decomposed: magnitudes divided by norms are gains."""
    labels = _norm_labels(form, axes, norm_over)
    direction = form
    if not norm_gradient:
        # At the inputs of the norm, so that no residuals are saved for a gradient that is not computed.
        factors = tuple(Factor(lax.stop_gradient(factor.array), factor.labels) for factor in form.factors)
        direction = dataclasses.replace(form, factors=factors)
    norm = norms(weight, direction, labels, axes.count(BATCH))
    sizes = dict(pair for axis in form.dims(weight.shape) for pair in axis)
    magnitude = magnitude.astype(norm.dtype).reshape([sizes[label] for label in labels])
    # A column of zeros has no direction; its magnitude is zero too.
    gain = magnitude / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    return dataclasses.replace(form, gains=(Factor(gain, labels),))


def magnitude_of(recipe: str, node: Adapter, form: Factored, weight: jax.Array, norm_over: str) -> jax.Array:
    """The norms of a weight plus a term, from which magnitudes start.

    At least float32, whatever the dtype of the factors: magnitudes of few bits would change the weight.

    Args:
      recipe: Its name, for messages.
      node: An adapter of the weight.
      form: The term's factored form.
      weight: The weight.
      norm_over: The axes that a norm is taken over.
    """
    if is_abstract(weight):
        raise ValueError(f"{recipe}(…) starts from the weight's norms; the base has its shape only.")
    axes, order = node.axes, (BATCH, OUT if norm_over == IN else IN)
    shape = [size for role in order for size in roles.sizes(node.shape(), axes, role)]
    return norms(weight, form, _norm_labels(form, axes, norm_over), axes.count(BATCH)).reshape(shape)


def _norm_labels(form: Factored, axes: Sequence[str], norm_over: str) -> tuple[str, ...]:
    """The labels of the axes that norms have, batch axes first."""
    order = (BATCH, OUT if norm_over == IN else IN)
    return tuple(label for role in order for axis, r in zip(form.labels, axes) if r == role for label in axis)


def norms(weight: Any, form: Factored, labels: Sequence[str], batch: int) -> jax.Array:
    """The norm of W plus the product of the factors, over all axes but those of `labels`.

    The sum of squares is ‖W‖² + 2·Re⟨W, ΔW⟩ + ‖ΔW‖², each part contracted factor by factor, so that
    nothing as large as the weight is formed. A quantized weight is dequantized for it, layer by layer.

    Args:
      weight: An array or a quantized leaf.
      form: Its adapter's.
      labels: Those of the batch axes first.
      batch: How many these are.

    Returns:
      At least float32, an axis a label.
    """
    if is_quantized(weight):
        return _quantized_norms(weight, form.factors, form.labels, tuple(labels), batch)
    dtype = compute_dtype(weight.dtype)
    pairs = [pair for axis in form.dims(weight.shape) for pair in axis]
    sizes = dict(pairs)
    out = [(label, sizes[label]) for label in labels]
    wide = Factor(weight.astype(dtype).reshape([size for _, size in pairs]), tuple(label for label, _ in pairs))
    factors = folded([Factor(factor.array.astype(dtype), factor.labels) for factor in form.factors])
    # ΔW once more, conjugated, with bonds of its own.
    twins = [
        Factor(factor.array.conj(), tuple(label if label in sizes else f"{label}'" for label in factor.labels))
        for factor in factors
    ]
    exact = lax.Precision.HIGHEST
    summed = [i for i, (label, _) in enumerate(pairs) if label not in labels]
    order = [label for label, _ in pairs if label in labels]
    squares = Factor(jnp.sum(jnp.square(jnp.abs(wide.array)), axis=summed), tuple(order)).transposed(labels).array
    cross = chain(Factor(wide.array.conj(), wide.labels), factors, out, precision=exact).real
    # Starts with the factor on the summed axes: its product with its conjugate is only rank × rank.
    start = min(range(len(factors)), key=lambda i: len(set(factors[i].labels) & set(labels)))
    delta = chain(factors[start], [*factors[:start], *factors[start + 1 :], *twins], out, precision=exact).real
    total = squares + 2.0 * cross + delta
    # The root has no gradient at zero.
    return jnp.where(total > 0.0, jnp.sqrt(jnp.where(total > 0.0, total, 1.0)), 0.0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _quantized_norms(
    leaf: Any, factors: tuple[Factor, ...], axes: tuple[tuple[str, ...], ...], labels: tuple[str, ...], batch: int
) -> jax.Array:
    """The norms of a quantized weight: one layer at a time is dequantized, and none is saved for gradients.

    Compiled once for each kind of weight, outside of `jit` too.

    Args:
      leaf: The weight.
      factors: The factors of its adapter.
      axes: The labels of each of its axes.
      labels: Those of the norms, batch axes first.
      batch: The number of batch axes.
    """
    if not batch or not getattr(leaf, "layers", 0) or axes[0] != labels[:1]:

        def whole(weight, factors):
            return norms(weight, Factored(labels=axes, factors=factors), labels, batch)

        return apply_dequantized(whole, leaf, factors)
    layer = labels[0]
    stacked = tuple(factor for factor in factors if layer in factor.labels)
    shared = tuple(factor for factor in factors if layer not in factor.labels)

    def first(factor: Factor) -> Factor:
        return factor.transposed([layer, *(label for label in factor.labels if label != layer)])

    def layer_norms(parts):
        leaf, arrays = parts
        sliced = tuple(Factor(array, first(factor).labels[1:]) for array, factor in zip(arrays, stacked))
        return _quantized_norms(leaf, (*sliced, *shared), axes[1:], labels[1:], batch - 1)

    return lax.map(layer_norms, (leaf, [first(factor).array for factor in stacked]))


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    r"""LoRA on the direction of each output's weights, with a trained magnitude: :math:`m\,V/\lVert V\rVert`.

    Takes what :class:`LoRA` takes; `dtype` is that of the factors, magnitudes are at least float32. Dropout acts on the
    input of the low-rank product only. And:

    Args:
      norm_over: The axes that a norm is taken over. 'in' gives each output a magnitude, as the authors' code does;
        'out' gives each input one (the other reading of the paper's columns, which LyCORIS follows).
      norm_gradient: Whether gradients flow through the norm; the paper stops them (§4.3), at no loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = DoRA(rank=2, alpha=4).create(jax.random.key(0), jnp.full((3, 5), 2.0), ("in", "out"))
      >>> adapter.magnitude.shape, float(adapter.magnitude[0]).__round__(4)
      ((5,), 3.4641)

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §4
    """

    norm_over: str = IN
    norm_gradient: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.one_of("DoRA", "norm_over", self.norm_over, NORM_OVER)
        checks.flag("DoRA", "norm_gradient", self.norm_gradient)

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> DoRAAdapter:
        term = LoRAAdapter(**fields)
        magnitude = magnitude_of("DoRA", term, term.factored(weight), weight, self.norm_over)
        return DoRAAdapter(**fields, magnitude=magnitude, norm_over=self.norm_over, norm_gradient=self.norm_gradient)


__getattr__ = module_getattr(__name__, WeightDecomposed="DoRAAdapter")
