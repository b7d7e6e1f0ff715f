"""Quantized bases: weights as codes of four or eight bits, which `adapt` accepts in place of arrays."""

from lora_jax.quantization.absmax import FP4, NF4, Int4, Int8
from lora_jax.quantization.bitsandbytes import bitsandbytes_tensors, from_bitsandbytes
from lora_jax.quantization.formats import Format
from lora_jax.quantization.ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from lora_jax.quantization.ggml_k import Q4_K, Q5_K, Q6_K
from lora_jax.quantization.gguf import from_gguf
from lora_jax.quantization.leaf import Quantized
from lora_jax.quantization.placement import gathered, shardings
from lora_jax.quantization.rules import Plan, dequantize, quantize
from lora_jax.quantization.scales import Scales
from lora_jax.renamed import module_getattr

__all__ = [
    "FP4",
    "NF4",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
    "Q8_0",
    "Format",
    "Int4",
    "Int8",
    "Plan",
    "Quantized",
    "Scales",
    "bitsandbytes_tensors",
    "dequantize",
    "from_bitsandbytes",
    "from_gguf",
    "gathered",
    "quantize",
    "shardings",
]

__getattr__ = module_getattr(__name__, four_bit_tensors="bitsandbytes_tensors")
