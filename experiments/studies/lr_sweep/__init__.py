"""Validation losses by learning rate, of LoRA at several ranks and of full fine-tuning."""
