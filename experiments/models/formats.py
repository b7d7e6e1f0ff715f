"""The formats of quantized weights by the names that commands use."""

import lora_jax as lora
from lora_jax.quantization import Format

FORMATS = {"nf4": lora.NF4, "fp4": lora.FP4, "int8": lora.Int8, "int4": lora.Int4}


def make_format(name: str, *, double: bool = True) -> Format | None:
    """Returns the format of a name; None for `none` and `stored`.

    Args:
      name: A name of :data:`FORMATS`, `none`, or `stored` for the codes of the checkpoint.
      double: Whether the scales are quantized too.

    Example:
      >>> make_format("nf4"), make_format("none")
      (NF4(axes=None, block=64, double=True), None)
    """
    return FORMATS[name](double=double) if name in FORMATS else None
