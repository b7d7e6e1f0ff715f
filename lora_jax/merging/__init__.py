"""The algebra of deltas: folded into weights and taken out, scaled, combined, truncated, and measured."""

from lora_jax.merging.combining import METHODS, combine, scale, truncate
from lora_jax.merging.folding import merge, switch_task, unmerge
from lora_jax.merging.measuring import distance, norm

__all__ = ["METHODS", "combine", "distance", "merge", "norm", "scale", "switch_task", "truncate", "unmerge"]
