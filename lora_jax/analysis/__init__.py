"""Analysis of deltas: spectra, shared subspaces, amplification, changes of direction and magnitude.

Everything is computed on the host in float64. For adapters that add a product of factors, ΔW is not formed. Results
are dicts by path. Their leading axes are the batch axes of the weight (and its blocks), so that each layer of a stack
has its own number or matrix. A weight is treated as a matrix `[in, out]`, with its in and its out axes flattened.
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
