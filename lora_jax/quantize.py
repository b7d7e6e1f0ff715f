"""The former name of :mod:`lora_jax.quantization`; `lora_jax.quantize` is the function."""

raise ImportError(
    "The package lora_jax.quantize has been renamed to lora_jax.quantization; lora_jax.quantize is a function."
)
