"""Quantised bases: weights as codes of four or eight bits, which `adapt` takes as they are."""

from lora_jax.quantize.bitsandbytes import bitsandbytes_tensors, from_bitsandbytes
from lora_jax.quantize.formats import FP4, NF4, Format, Int4, Int8
from lora_jax.quantize.leaf import Quantized
from lora_jax.quantize.placement import gathered, shardings
from lora_jax.quantize.rules import Plan, dequantize, quantize
from lora_jax.quantize.scales import Scales

__all__ = [
    "FP4",
    "NF4",
    "Format",
    "Int4",
    "Int8",
    "Plan",
    "Quantized",
    "Scales",
    "bitsandbytes_tensors",
    "dequantize",
    "from_bitsandbytes",
    "gathered",
    "quantize",
    "shardings",
]
