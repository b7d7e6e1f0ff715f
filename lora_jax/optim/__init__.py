"""Which leaves train, and Optax transforms that know what a delta's leaves are."""

from lora_jax.optim.trainable import join, optimizer, partition, trainable_mask

__all__ = ["join", "optimizer", "partition", "trainable_mask"]
