"""How the factors of a low-rank term start.

Some initializers draw factors whose product is zero, so that training starts from the base function. Others make them
from a part of the weight, which then leaves the base, or from what data tells of the weight; they go through
:func:`lora_jax.prepare`. A recipe's `init` is one of these, or its name where it needs no argument.
"""

from lora_jax.initializers.activations import EVA, CorDA
from lora_jax.initializers.drawn import Drawn, gaussian, kaiming_uniform, orthogonal, zero_a
from lora_jax.initializers.gradients import LoRAGA
from lora_jax.initializers.initializer import (
    GRADIENT,
    INPUTS,
    Calibrated,
    Given,
    Initializer,
    Inputs,
    Reading,
    Start,
)
from lora_jax.initializers.parts import OLoRA, PiSSA
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
    "Given",
    "Initializer",
    "Inputs",
    "LoRAGA",
    "LoftQ",
    "OLoRA",
    "PiSSA",
    "Reading",
    "Start",
    "get_initializer",
]

INITIALIZERS: dict[str, Initializer] = {
    # Lookups start with a = 0 and b normal, as loralib and PEFT start embeddings.
    "kaiming_uniform": Drawn(kaiming_uniform, lookup=zero_a),
    "gaussian": Drawn(gaussian),
    "zero_a": Drawn(zero_a),
    "orthogonal": Drawn(orthogonal),
    "pissa": PiSSA(),
    "olora": OLoRA(),
    "eva": EVA(),
    "corda": CorDA(),
    "lora_ga": LoRAGA(),
}


def get_initializer(init: str | Initializer) -> Initializer:
    """The initializer of a name; an :class:`Initializer` is itself.

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


__getattr__ = module_getattr(__name__, find="get_initializer")
