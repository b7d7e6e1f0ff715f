"""A sweep over LoRA's rank and learning rate."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings
from experiments.configs.comparison import Comparison


@dataclass(frozen=True)
class Config(Comparison):
    """Selects LoRA's rank and learning rate for the quickstart's task.

    lora_jax.train_many trains all adapters of the grid in one run, on the same batches and one copy of the base.
    Validation accuracy selects a learning rate for each rank, and only these adapters are evaluated on the test
    examples.

    The default takes under 10 minutes on 2 CPU cores and about 4 GB of memory. It writes the adapters, a page, a JSON
    record and a heat map to --out. After an interruption, the same command resumes.

    There is no --paper, since no paper has this sweep.
    """

    STUDY = "experiments.studies.sweep"
    MINUTES = 10
    FAST: ClassVar = {"ranks": (1, 2), "learning_rates": (1e-3, 1e-2)}

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of LoRA on query and value, up to the quickstart's."""

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates, around the 1.8e-3 of the published rule (LoRA Without Regret; see `lr-sweep`)."""

    out: Path = Path("runs/sweep")
    """The output directory. A sweep that it already holds is resumed or shown, not repeated."""

    seeds: int = 1
    """Runs of each rank at its selected learning rate."""

    validation_examples: int | None = 800
    """Number of validation examples. They select the head's penalty and the learning rates. None uses all."""

    test_examples: int | None = 2000
    """Number of test examples, on which the selected adapters are evaluated once, at the end. None uses all."""

    lengths: tuple[int, ...] = (10, 14, 20, 40)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "learning_rates")


DEFAULTS = Config()
