"""Initializers of the factors of a low-rank term.

Some draw factors whose product is zero, so that training starts from the base function. Others compute them from a part
of the weight, which is subtracted from the base, or from statistics of the data; they require
:func:`lora_jax.prepare`. A recipe's `init` is one of these, or the name of one that needs no argument.
"""

from lora_jax.initializers.activations import EVA, CorDA
from lora_jax.initializers.drawn import Drawn, gaussian, kaiming_uniform, orthogonal, zero_a
from lora_jax.initializers.gradients import LoRAGA
from lora_jax.initializers.initializer import (
    GRADIENT,
    INPUTS,
    Calibrated,
    Factors,
    Initializer,
    Inputs,
    Statistics,
    Target,
)
from lora_jax.initializers.parts import MiLoRA, OLoRA, PiSSA
from lora_jax.initializers.quantized import LoftQ
from lora_jax.renamed import module_getattr

__all__ = [
    "EVA",
    "GRADIENT",
    "INITIALIZERS",
    "INPUTS",
    "Calibrated",
    "CorDA",
    "Drawn",
    "Factors",
    "Initializer",
    "Inputs",
    "LoRAGA",
    "LoftQ",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Statistics",
    "Target",
    "get_initializer",
]

INITIALIZERS: dict[str, Initializer] = {
    # Lookups start with a = 0 and b normal, as loralib and PEFT start embeddings.
    "kaiming_uniform": Drawn(kaiming_uniform, lookup=zero_a),
    "gaussian": Drawn(gaussian),
    "zero_a": Drawn(zero_a),
    "orthogonal": Drawn(orthogonal),
    "pissa": PiSSA(),
    "milora": MiLoRA(),
    "olora": OLoRA(),
    "eva": EVA(),
    "corda": CorDA(),
    "lora_ga": LoRAGA(),
}
"""Initializers by the name that a recipe's `init` has for them."""


def get_initializer(init: str | Initializer) -> Initializer:
    """Returns the initializer of a name; an :class:`Initializer` is returned unchanged.

    Raises:
      ValueError: No such name.

    Example:
      >>> get_initializer("pissa")
      PiSSA(niter=None)
    """
    if isinstance(init, Initializer):
        return init
    if not isinstance(init, str) or init not in INITIALIZERS:
        hint = " LoftQ needs a quantizer: init=LoftQ(quantizer)." if init == "loftq" else ""
        raise ValueError(
            f"init={init!r}: expected one of {', '.join(map(repr, INITIALIZERS))} or an Initializer.{hint}"
        )
    return INITIALIZERS[init]


__getattr__ = module_getattr(
    __name__,
    find="get_initializer",
    Given="Target",
    Informed="Calibrated",
    Reading="Statistics",
    Start="Factors",
)
