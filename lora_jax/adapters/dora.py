"""DoRA: a low-rank term for the direction of each output's weights, a trained magnitude beside it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Factor, Factored, chain, compute_dtype
from lora_jax.adapters.lowrank import LoRA, LowRank
from lora_jax.adapters.protocol import BATCH, OUT, adapter, static, trained


@adapter("DoRA")
class WeightDecomposed(LowRank):
    """W' = magnitude / ‖V‖ · V per output, with V = W + scale · Σᵣ a[r] · b[r] and ‖V‖ over the in axes.

    Attributes:
      magnitude: `[*batch, *out]`.
      norm_gradient: Whether gradients flow through ‖V‖.
    """

    magnitude: jax.Array = trained()
    norm_gradient: bool = static()

    additive = False

    def factored(self, weight: jax.Array) -> Factored:
        form = super().factored(weight)
        kept = [labels for labels, role in zip(form.labels, self.axes) if role == BATCH]
        kept += [labels for labels, role in zip(form.labels, self.axes) if role == OUT]
        sizes = dict(pair for axis in form.dims(weight.shape) for pair in axis)
        labels = tuple(label for axis in kept for label in axis)
        norm = norms(weight, form, labels)
        if not self.norm_gradient:
            norm = lax.stop_gradient(norm)
        magnitude = self.magnitude.astype(norm.dtype).reshape([sizes[label] for label in labels])
        # A column of zeros has no direction; its magnitude is zero too.
        gain = magnitude / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
        return dataclasses.replace(form, gains=(Factor(gain, labels),))


def norms(weight: jax.Array, form: Factored, labels: Sequence[str]) -> jax.Array:
    """The norm of W plus the product of the factors, over all axes but those of `labels`.

    The sum of squares is ‖W‖² + 2·⟨W, ΔW⟩ + ‖ΔW‖², each part contracted factor by factor, so that
    nothing as large as the weight is formed.

    Returns:
      At least float32, an axis a label.
    """
    dtype = compute_dtype(weight.dtype)
    pairs = [pair for axis in form.dims(weight.shape) for pair in axis]
    sizes = dict(pairs)
    out = [(label, sizes[label]) for label in labels]
    wide = Factor(weight.astype(dtype).reshape([size for _, size in pairs]), tuple(label for label, _ in pairs))
    factors = [Factor(factor.array.astype(dtype), factor.labels) for factor in form.factors]
    # ΔW once more, with bonds of its own.
    twins = [
        Factor(factor.array, tuple(label if label in sizes else f"{label}'" for label in factor.labels))
        for factor in factors
    ]
    exact = lax.Precision.HIGHEST
    summed = [i for i, (label, _) in enumerate(pairs) if label not in labels]
    order = [label for label, _ in pairs if label in labels]
    squares = Factor(jnp.sum(jnp.square(wide.array), axis=summed), tuple(order)).transposed(labels).array
    cross = chain(wide, factors, out, precision=exact)
    delta = chain(factors[0], [*factors[1:], *twins], out, precision=exact)
    total = squares + 2.0 * cross + delta
    # The root has no gradient at zero.
    return jnp.where(total > 0.0, jnp.sqrt(jnp.where(total > 0.0, total, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    r"""LoRA on the direction of each output's weights, with a trained magnitude: :math:`m\,V/\lVert V\rVert`.

    Takes what :class:`LoRA` takes, and:

    Args:
      norm_gradient: Whether gradients flow through the norm; the paper stops them (§4.3), at no loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> made = DoRA(rank=2, alpha=4).make(jax.random.key(0), jnp.full((3, 5), 2.0), ("in", "out"))
      >>> made.magnitude.shape, float(made.magnitude[0]).__round__(4)
      ((5,), 3.4641)

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §4
    """

    norm_gradient: bool = False

    def _make(self, key, weight, axes, moves: bool) -> tuple[jax.Array, WeightDecomposed]:
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError("DoRA(…) starts from the weight's norms; the base has its shape only.")
        weight, low = super()._make(key, weight, axes, moves)
        fields = {field.name: getattr(low, field.name) for field in dataclasses.fields(low)}
        form = low.factored(weight)
        roles = [(role, labels) for role, labels in zip(low.axes, form.labels)]
        labels = [x for wanted in (BATCH, OUT) for role, axis in roles if role == wanted for x in axis]
        shape = [n for wanted in (BATCH, OUT) for n, role in zip(weight.shape, low.axes) if role == wanted]
        magnitude = norms(weight, form, labels).reshape(shape).astype(self.dtype)
        return weight, WeightDecomposed(**fields, magnitude=magnitude, norm_gradient=self.norm_gradient)
