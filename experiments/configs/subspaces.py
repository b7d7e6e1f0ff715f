"""Which subspaces LoRA learns, and how much it amplifies them (LoRA paper, figures 3 and 4, table 7)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments import settings
from experiments.configs import papers
from experiments.configs.comparison import PaperComparison


@dataclass(frozen=True)
class Config(PaperComparison):
    """Compares the directions that LoRA of two ranks and two seeds learns (LoRA, figures 3 and 4, table 7).

    The overlap φ(i, j) of the first i directions of one run and the first j of another is 1 if one space contains the
    other and 0 if they are orthogonal. The amplification is the norm of ΔW divided by that of W in the directions of
    ΔW. The paper adapts GPT-3 175B; here all-MiniLM-L6-v2 classifies Debian packages.
    """

    STUDY = "experiments.studies.subspaces"
    MINUTES = 4
    PRESETS: ClassVar = {"gpt-3": papers.gpt3("LoRA, figures 3 and 4, tables 7 and 12", lr=papers.GPT3_RATES["LoRA"])}
    FAST: ClassVar = {"rank": 1, "large_rank": 3, "seeds": 2}

    out: Path = Path("runs/subspaces")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    paper: Literal["gpt-3"] | None = None
    """The setting of the paper: gpt-3 (figures 3 and 4, table 12) on MNLI, for --model instead of GPT-3 175B,
    with --data glue/mnli or glue/mnli:DIRECTORY. Other flags win."""

    seeds: int = 2
    """Runs of each row, at least 2: the first two are compared."""

    epochs: int = 3
    """Passes over the training examples."""

    rank: int = 8
    """The small rank, as in the paper."""

    large_rank: int = 64
    """The large rank, as in the paper."""

    layer: int | None = None
    """The layer of the figure, from 0; None is the middle one. The record has φ of the first and of all directions of
    every layer."""

    lr: float = 3e-3
    """Peak learning rate, for the alpha of 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "rank", "lr")
        settings.not_negative(self, "layer")
        if self.large_rank <= self.rank:
            raise ValueError(f"large_rank must be above rank ({self.rank}), not {self.large_rank}")
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, which are compared, not {self.seeds}")


DEFAULTS = Config()
