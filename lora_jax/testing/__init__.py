"""Contract tests for adapters, the package's and those that users write."""

from lora_jax.testing.contract import check_adapter
from lora_jax.testing.jaxprs import weight_gradients

__all__ = ["check_adapter", "weight_gradients"]
