"""Flax NNX models that carry Hugging Face weights."""
