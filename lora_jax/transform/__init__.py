"""The transform: functions of parameters as functions of (base, delta)."""

from lora_jax.renamed import module_getattr

__getattr__ = module_getattr(__name__)
