"""A tiny random GPT-2: trained, merged, exported."""

from pathlib import Path

from experiments.configs.language_model import Config

DEFAULTS = Config(
    family="gpt2",
    model="tiny-gpt2",
    targets=("attention", "feed-forward", "norms", "embedding"),  # the head is the embedding
    out=Path("runs/gpt2-tiny"),
)
