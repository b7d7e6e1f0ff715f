"""Adapts a causal language model: training, generation, merging, export and loading."""
