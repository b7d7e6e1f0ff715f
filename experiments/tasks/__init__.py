"""Labeled texts and continuations: reading, tokenizing and batching."""
