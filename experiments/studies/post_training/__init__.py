"""Post-training of a decoder: preferences, rewards and distillation, compared with the base on held-out records."""
