"""Partitioning of deltas into trainable and frozen leaves, and Optax transforms for adapters."""

from lora_jax.optim.allocation import AllocationState, allocate_ranks, orthogonality, rank_budget
from lora_jax.optim.groups import by_path, decay_mask, labels, lora_plus
from lora_jax.optim.offload import host_offloaded
from lora_jax.optim.riemannian import scale_by_riemannian
from lora_jax.optim.trainable import join, optimizer, partition, trainable_mask

__all__ = [
    "AllocationState",
    "allocate_ranks",
    "by_path",
    "decay_mask",
    "host_offloaded",
    "join",
    "labels",
    "lora_plus",
    "optimizer",
    "orthogonality",
    "partition",
    "rank_budget",
    "scale_by_riemannian",
    "trainable_mask",
]
