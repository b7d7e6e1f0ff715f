"""Settings that a config leaves to the model."""

from collections.abc import Mapping
from typing import Any

from flax import nnx
from rich.console import Console

from experiments.configs.sft import SWEPT, Config
from experiments.models import families
from experiments.models.options import Options
from experiments.training.optimizer import published_rate


def choose_rate(config: Config, description: Mapping[str, Any], console: Console | None = None) -> float:
    """Returns the learning rate of a config. Unless the config has a number, it depends on the model.

    Args:
      config: The study's config.
      description: The model's `config.json`.
      console: Where to print a rate that is chosen, and where it comes from.
    """
    if isinstance(config.lr, float | int):
        return config.lr
    if config.lr is None and config.model in SWEPT:
        rate, origin = SWEPT[config.model], f"the best of short runs of {config.model}"
    else:
        kind, size = str(description.get("model_type")), description.get("hidden_size") or description.get("n_embd")
        rate = float(f"{published_rate(int(size or 2000), kind):.2g}")
        origin = f"the published rule for LoRA on a model of hidden size {size:,}"
    if console is not None:
        console.print(f"lr {rate:.2g}: {origin}", highlight=False, soft_wrap=True)
    return rate


def longest_sequence(description: Mapping[str, Any]) -> int | None:
    """Returns the longest sequence that a model supports; None if unknown."""
    family = families.get_family(description)
    shape = family.shape(description)
    return nnx.eval_shape(lambda: family.build(shape, Options(scan=True), rngs=nnx.Rngs(0))).trained_length
