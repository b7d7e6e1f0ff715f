"""LoRA-FA: LoRA with a frozen first factor."""

import dataclasses
from typing import Any

import jax

from lora_jax.adapters.lowrank import LoRA, LoRAAdapter
from lora_jax.adapters.protocol import LOOKUP, adapter, frozen
from lora_jax.renamed import module_getattr


@adapter("LoRA-FA")
class LoRAFAAdapter(LoRAAdapter):
    """A low-rank term of which `b` alone trains."""

    a: jax.Array = frozen("batch block rank in")


@dataclasses.dataclass(frozen=True)
class LoRAFA(LoRA):
    r"""LoRA with `a` frozen: half of the trained numbers, and no input saved for the gradient of `a`.

    Takes what :class:`LoRA` takes. Embeddings start, as LoRA's do, from a zero `a`, which would stay zero: they need
    an `init` that draws it, such as 'gaussian'.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": LoRAFA(2, axes=("in", "out"))})
      >>> [leaf.shape for leaf in jax.tree.leaves(lora.partition(delta)[0])]
      [(2, 3)]

    References:
      Zhang et al., `LoRA-FA <https://arxiv.org/abs/2308.03303>`_, 2023, §3
    """

    def _create(self, key, weight, axes, moves: bool) -> tuple[jax.Array, LoRAAdapter]:
        weight, node = super()._create(key, weight, axes, moves)
        starts_at_zero = self.init == "zero_a" or (self.init == "kaiming_uniform" and LOOKUP in axes)
        # A tracer has no values yet.
        if starts_at_zero if isinstance(node.a, jax.core.Tracer) else not node.a.any():
            raise ValueError(
                f"LoRAFA(init={self.init!r}) starts this weight from a zero a, which stays zero: choose an init that "
                "draws a, such as 'gaussian'."
            )
        return weight, node

    def _adapter(self, fields: dict[str, Any], weight: jax.Array) -> LoRAFAAdapter:
        del weight
        return LoRAFAAdapter(**fields)


__getattr__ = module_getattr(__name__, FrozenA="LoRAFAAdapter")
