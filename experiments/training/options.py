"""Choices of the training settings."""

from typing import Literal

Schedule = Literal["linear", "cosine", "constant", "wsd"]
"""The learning rate after warmup; see :func:`experiments.training.optimizer.learning_rate`."""
