"""Which rank is enough, by adapted weights (LoRA paper, tables 6 and 18)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments import settings
from experiments.configs import papers
from experiments.configs.comparison import PaperComparison


@dataclass(frozen=True)
class Config(PaperComparison):
    """Trains LoRA of ranks 1 to 64 on several sets of weights, beside full rank and full fine-tuning (LoRA, table 6).

    The paper adapts GPT-3 175B on WikiSQL and MNLI and finds that a rank of 1 is enough for query and value together,
    while query alone needs more; it adapts GPT-2 medium with ranks up to 1,024 on E2E (table 18), whose scores the
    table has beside ours. Here all-MiniLM-L6-v2 classifies Debian packages.
    """

    STUDY = "experiments.studies.rank"
    MINUTES = 20
    PRESETS: ClassVar = {
        "gpt-3": papers.gpt3("LoRA, tables 6 and 12", lr=papers.GPT3_RATES["LoRA"], full_lr=papers.GPT3_RATES["full"])
    }
    FAST: ClassVar = {"ranks": (1, 4), "full_rank": 8}

    out: Path = Path("runs/rank")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    paper: Literal["gpt-3"] | None = None
    """The setting of the paper: gpt-3 (tables 6 and 12) on MNLI, for --model instead of GPT-3 175B,
    with --data glue/mnli or glue/mnli:DIRECTORY. Other flags win."""

    ranks: tuple[int, ...] = (1, 2, 4, 8, 64)
    """The ranks: those of the paper."""

    full_rank: int | None = None
    """The rank of LoRA on all linear layers that is compared with full fine-tuning; None is the width of the model."""

    lr: float = 3e-3
    """Peak learning rate of LoRA, for the alpha of 32."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "full_rank", "lr", "full_lr")


DEFAULTS = Config()
