"""Contrastive tuning of a sentence encoder for retrieval."""
