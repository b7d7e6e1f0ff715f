"""Post-training of a decoder: preferences, compared with the base on held-out records."""
