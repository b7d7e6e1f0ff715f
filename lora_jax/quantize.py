"""The former name of :mod:`lora_jax.quantization`; `lora_jax.quantize` is the function."""

raise ImportError("lora_jax.quantize is a function; what the package of that name held is in lora_jax.quantization.")
