"""The algebra of deltas: folded into weights and taken out, scaled, combined, truncated, and measured."""

from lora_jax.merging.combining import METHODS, combine, scale, truncate
from lora_jax.merging.folding import merge, switch_task, unmerge
from lora_jax.merging.measuring import distance, norm
from lora_jax.merging.requantizing import RoundingError, merge_quantized

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
