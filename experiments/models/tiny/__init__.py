"""Tiny checkpoints in Hugging Face layout, with random weights and real tokenizers; `make.py` made them."""
