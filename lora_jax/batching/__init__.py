"""Many adapters on one base: stacking, routing by example, and joint training."""

from lora_jax.batching.routing import route
from lora_jax.batching.stacking import stack, swap, unstack
from lora_jax.batching.training import TrainStates, train_many

__all__ = ["TrainStates", "route", "stack", "swap", "train_many", "unstack"]
