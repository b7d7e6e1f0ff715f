"""The former name of :mod:`lora_jax.calibration`."""

from lora_jax.calibration import collect_stats
from lora_jax.renamed import module_getattr

__all__ = ["collect_stats"]

__getattr__ = module_getattr(__name__, capture="lora_jax.calibration.collect_stats")
