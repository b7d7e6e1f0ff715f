"""Supervised fine-tuning of a decoder on conversations or on prompts with completions, from a laptop to a pod."""
