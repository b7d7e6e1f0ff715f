"""What a delta does to its weights: spectra, shared subspaces, amplification, changes of direction and magnitude.

Everything is computed on the host in float64. Where an adapter adds a product of factors, its ΔW is never formed.
Results are per path, with an axis for each batch axis of the weight (and one for its blocks) in front: a number or a
matrix for each layer of a stack. A weight counts as a matrix `[in, out]`, each group of axes flattened.
"""

from lora_jax.analysis.decomposition import Decomposition, decompose, decompose_weights
from lora_jax.analysis.movement import Drift, correlation, drift
from lora_jax.analysis.subspaces import Amplification, amplification, factor_directions, similarity

__all__ = [
    "Amplification",
    "Decomposition",
    "Drift",
    "amplification",
    "correlation",
    "decompose",
    "decompose_weights",
    "drift",
    "factor_directions",
    "similarity",
]
