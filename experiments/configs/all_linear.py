"""Which layers QLoRA has to adapt (QLoRA paper, figure 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings
from experiments.configs.comparison import Comparison


@dataclass(frozen=True)
class Config(Comparison):
    """Adapts more and more layers of an NF4 base, with several ranks, beside full fine-tuning (QLoRA, figure 2).

    The paper trains LLaMA 7B on Alpaca: LoRA on all linear layers is needed to match full fine-tuning, and the rank
    does not matter then. Here all-MiniLM-L6-v2, whose linear layers are stored as NF4 with double quantization,
    classifies Debian packages.
    """

    STUDY = "experiments.studies.all_linear"
    MINUTES = 20
    FAST: ClassVar = {"ranks": (1, 4)}

    out: Path = Path("runs/all-linear")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    ranks: tuple[int, ...] = (2, 8, 32)
    """The ranks."""

    lr: float = 3e-3
    """Peak learning rate of LoRA, for the alpha of 32."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning, without quantization."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "lr", "full_lr")


DEFAULTS = Config()
