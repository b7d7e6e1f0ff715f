"""DoRA beside LoRA, full fine-tuning and weight normalization (DoRA paper, tables 1, 6 and 7, figures 2 and 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings
from experiments.configs.comparison import Comparison


@dataclass(frozen=True)
class Config(Comparison):
    """Compares DoRA with LoRA by rank, with and without its parts, and their changes of magnitude and direction.

    The paper adapts LLaMA 7B for commonsense reasoning (tables 1, 6 and 7), and finds that ΔM and ΔD, the changes of
    magnitude and direction, are negatively correlated in full fine-tuning and DoRA, and positively in LoRA (figure 2).
    Here all-MiniLM-L6-v2 classifies Debian packages; all linear layers are adapted.

    There is no --paper: the original setting (table 8) is of LLaMA, a decoder, on commonsense reasoning:
    sft --paper commonsense.
    """

    STUDY = "experiments.studies.dora"
    MINUTES = 20
    FAST: ClassVar = {"ranks": (1, 2), "full_rank": 8}

    out: Path = Path("runs/dora")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    ranks: tuple[int, ...] = (2, 4, 8, 16)
    """The ranks; the middle one is that of DoRA's parts, and of the changes of magnitude and direction."""

    full_rank: int | None = None
    """The rank of weight normalization; None is the width of the model."""

    lr: float = 3e-3
    """Peak learning rate of LoRA and DoRA, for the alpha of 32."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "full_rank", "lr", "full_lr")

    @property
    def rank(self) -> int:
        """The middle one of the ranks."""
        return sorted(self.ranks)[len(self.ranks) // 2]


DEFAULTS = Config()
