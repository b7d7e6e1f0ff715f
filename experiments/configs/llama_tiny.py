"""A tiny random Llama: trained, merged, exported."""

from pathlib import Path

from experiments.configs.language_model import Config

DEFAULTS = Config(
    family="llama",
    model="tiny-llama",
    targets=("attention", "feed-forward", "norms", "embedding", "head"),
    out=Path("runs/llama-tiny"),
)
