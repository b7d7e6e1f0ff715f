"""AdaLoRA: a low-rank term in the form of a singular value decomposition, whose values can be pruned."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factored, compute_dtype
from lora_jax.adapters.layouts import IN
from lora_jax.adapters.lowrank import LoRA, LoRAAdapter, low_rank_form
from lora_jax.adapters.protocol import Adapter, adapter, frozen, static, trained
from lora_jax.initializers import Drawn, Initializer
from lora_jax.leaves import align_leading
from lora_jax.renamed import module_getattr


@adapter("AdaLoRA")
class AdaLoRAAdapter(Adapter):
    """ΔW[in, out] = scale · Σᵣ values[r] · a[r, in] · b[r, out].

    A value of zero prunes its triplet; shapes stay. :func:`lora_jax.optim.allocate_ranks` decides which.

    Attributes:
      a: `[*batch, (blocks,) rank, *in]`; the paper's Q.
      values: `[*batch, (blocks,) rank]`; the paper's Λ.
      b: `[*batch, (blocks,) rank, *out]`; the paper's P, transposed.
      scale: Scalar, or one for each batch element, as in :class:`lora_jax.adapters.lowrank.LoRAAdapter`.
      dropout: Scalar; the rate on the input of the low-rank product if a dropout key is passed.
      axes: The role of each axis of the weight.
      blocks: Which of the equal parts of the out axis are adapted.
    """

    a: jax.Array = trained("batch block rank in")
    values: jax.Array = trained("batch block rank", vector=True)
    b: jax.Array = trained("batch block rank out")
    scale: jax.Array = frozen("batch block", leading=True)
    dropout: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]
    blocks: tuple[bool, ...] = static()

    additive = True

    def folded(self) -> LoRAAdapter:
        """The same term as a pair of factors, with the values in `b`, for combining, exporting and measuring."""
        dtype = compute_dtype(self.b.dtype)
        return LoRAAdapter(
            a=self.a,
            b=self.b.astype(dtype) * align_leading(self.values.astype(dtype), self.b.ndim),
            scale=self.scale,
            dropout=self.dropout,
            axes=self.axes,
            blocks=self.blocks,
        )

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        dtype = compute_dtype(self.values.dtype)
        return low_rank_form(
            self, self.values.astype(dtype) * align_leading(self.scale.astype(dtype), self.values.ndim)
        )

    def describe(self) -> dict[str, Any]:
        return self.folded().describe()


def _normal(key, batch, rank, fan_in, fan_out):
    """a, b ~ N(0, 0.02²)."""
    key_a, key_b = jax.random.split(key)
    a = 0.02 * jax.random.normal(key_a, (batch, rank, fan_in), jnp.float32)
    return a, 0.02 * jax.random.normal(key_b, (batch, rank, fan_out), jnp.float32)


NORMAL = Drawn(_normal)


@dataclasses.dataclass(frozen=True)
class AdaLoRA(LoRA):
    r"""A low-rank term whose rank is decided in training: :math:`W + s\,A^\top \mathrm{diag}(\lambda)\,B`.

    The values :math:`\lambda` start at zero, the factors at N(0, 0.02²). The optimizer is wrapped in
    :func:`lora_jax.optim.allocate_ranks`, which sets the least important values to zero, and
    :func:`lora_jax.optim.orthogonality` is added to the loss.

    Takes what :class:`LoRA` takes but `init`; `rank` is the one that training begins with. PEFT divides alpha by
    rank + 1e-5: alpha · rank / (rank + 1e-5) here gives its scale exactly.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = AdaLoRA(rank=12, alpha=24).create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out"))
      >>> adapter.a.shape, adapter.values.shape, adapter.b.shape, float(adapter.scale)
      ((12, 16), (12,), (12, 32), 2.0)

    References:
      Zhang et al., `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, §3.1
    """

    init: Initializer = dataclasses.field(default=NORMAL, init=False, repr=False)  # pyrefly: ignore[bad-override]

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> AdaLoRAAdapter:
        del weight
        lead = fields["a"].shape[: fields["a"].ndim - fields["axes"].count(IN)]
        return AdaLoRAAdapter(**fields, values=jnp.zeros(lead, self.dtype))


__getattr__ = module_getattr(__name__, SingularTriplets="AdaLoRAAdapter")
