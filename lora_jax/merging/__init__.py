"""The algebra of deltas: merge and unmerge, scale, combine, truncate and measure them."""

from lora_jax.merging.combining import METHODS, combine, scale
from lora_jax.merging.folding import merge, switch_task, unmerge
from lora_jax.merging.measuring import distance, norm
from lora_jax.merging.requantizing import RoundingError, merge_quantized
from lora_jax.merging.truncation import truncate

__all__ = [
    "METHODS",
    "RoundingError",
    "combine",
    "distance",
    "merge",
    "merge_quantized",
    "norm",
    "scale",
    "switch_task",
    "truncate",
    "unmerge",
]
