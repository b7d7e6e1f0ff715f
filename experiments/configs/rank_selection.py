"""Where rank is needed: uniform LoRA, AdaLoRA, EVA, and truncation by one threshold."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings
from experiments.configs.comparison import Comparison


@dataclass(frozen=True)
class Config(Comparison):
    """Compares ways to choose a rank for each weight by the accuracy for as many parameters.

    Uniform LoRA on all linear layers; AdaLoRA, which prunes in training; EVA, which distributes ranks before training;
    and truncation of trained LoRA by one threshold for the singular values of all weights, which needs no other
    training. The question is whether a quarter of the parameters is enough for at most half a point less.

    There is no --paper: this is an open question of the LoRA paper, which has no setting for it.
    """

    STUDY = "experiments.studies.rank_selection"
    MINUTES = 15
    FAST: ClassVar = {"ranks": (1, 4), "energies": (0.9, 0.5)}

    out: Path = Path("runs/rank-selection")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """The ranks of uniform LoRA. The largest is truncated, and is AdaLoRA's first rank."""

    target_rank: int = 2
    """The mean rank that AdaLoRA ends with, and that EVA distributes."""

    energies: tuple[float, ...] = (0.99, 0.95, 0.9, 0.8, 0.6)
    """The shares of the squared norm of all changes of weights that truncation preserves."""

    lr: float = 3e-3
    """Peak learning rate, for the alpha of 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "target_rank", "lr", "energies")
        if max(self.energies) > 1:
            raise ValueError(f"energies must be shares of at most 1, not {max(self.energies)}")
        if self.target_rank >= max(self.ranks):
            raise ValueError(f"target_rank must be below the largest of the ranks, {max(self.ranks)}")


DEFAULTS = Config()
