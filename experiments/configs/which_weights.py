"""Which weights of attention to adapt, with the same number of parameters (LoRA paper, table 5)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments import settings
from experiments.configs import papers
from experiments.configs.comparison import PaperComparison


@dataclass(frozen=True)
class Config(PaperComparison):
    """Adapts every subset of query, key, value and output with the same number of parameters (LoRA paper, table 5).

    The ranks are such that every subset has as many parameters; the feed-forward layers, and all linear layers, follow
    with as many. The paper adapts GPT-3 175B with 18 million parameters on WikiSQL and MNLI. Here all-MiniLM-L6-v2
    classifies Debian packages, with 36 times the parameters of rank 1 on one weight of each layer.
    """

    STUDY = "experiments.studies.which_weights"
    MINUTES = 20
    PRESETS: ClassVar = {"gpt-3": papers.gpt3("LoRA, tables 5 and 12", budget=12, lr=papers.GPT3_RATES["LoRA"])}
    FAST: ClassVar = {"budget": 12}

    out: Path = Path("runs/which-weights")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    paper: Literal["gpt-3"] | None = None
    """The setting of the paper: gpt-3 (tables 5 and 12) on MNLI, for --model instead of GPT-3 175B,
    with --data glue/mnli or glue/mnli:DIRECTORY. Other flags win."""

    budget: int = 36
    """The rank of an adapter of one weight of attention; two weights get half of it each, and so on. A multiple of
    12; the paper has 8, which three weights cannot share."""

    lr: float = 3e-3
    """Peak learning rate, for the alpha of 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "budget", "lr")
        if self.budget % 12:
            raise ValueError(f"budget must be a multiple of 12, which 1, 2, 3 and 4 weights divide, not {self.budget}")


DEFAULTS = Config()
