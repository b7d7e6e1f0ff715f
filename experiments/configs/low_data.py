"""How methods compare with few examples (LoRA paper, table 16)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from experiments import settings
from experiments.configs import papers
from experiments.configs.comparison import PaperComparison


@dataclass(frozen=True)
class Config(PaperComparison):
    """Trains on 100, 1,000 and all examples with LoRA, prefix tuning and full fine-tuning (LoRA, table 16).

    The paper adapts GPT-3 175B on subsets of MNLI, for 40, 40 and 4 epochs, and finds that LoRA is as good as full
    fine-tuning with all sizes, and prefix tuning much worse with few examples. Here all-MiniLM-L6-v2 classifies Debian
    packages; the converged head, from which all methods start, is fitted to the same examples.
    """

    STUDY = "experiments.studies.low_data"
    PRESETS: ClassVar = {
        "gpt-3": papers.gpt3(
            "LoRA, tables 16 and 17",
            lambda task: {
                ", (100|1,000) examples$": {"batch_size": 20},
                ", 10,000 examples$": {"batch_size": 100},
            },
            sizes=(100, 1000, 10_000, 391_702),
            heading=None,
            notes=(
                "The warmup is 0.8 % of the steps with few examples, too, of which 250,000 tokens are a larger share.",
            ),
            size_epochs=(40, 40, 4, 2),
            lr=(papers.GPT3_RATES["LoRA"],),
            full_lr=(papers.GPT3_RATES["full"],),
            prefix_lr=(5e-5, 1e-4),
        )
    }
    MINUTES = 20
    FAST: ClassVar = {"sizes": (24, 48), "size_epochs": (1, 1)}

    out: Path = Path("runs/low-data")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    paper: Literal["gpt-3"] | None = None
    """The setting of the paper: gpt-3 (tables 16 and 17) on MNLI, for --model instead of GPT-3 175B,
    with --data glue/mnli or glue/mnli:DIRECTORY. Other flags win."""

    train_examples: int | None = 4000
    """Number of training examples, from the beginning of the file: the largest of the sizes. None uses all."""

    sizes: tuple[int, ...] = (100, 1000, 4000)
    """The numbers of training examples."""

    size_epochs: tuple[int, ...] = (10, 3, 1)
    """Passes over the training examples, for each of the sizes."""

    rank: int = 8
    """The rank of LoRA on query and value."""

    lr: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates of LoRA, for the alpha of 32. Validation selects one for each size."""

    prefix: int = 16
    """The length of the prefix."""

    prefix_lr: tuple[float, ...] = (1e-2, 3e-2)
    """Peak learning rates of the prefix. Validation selects one for each size."""

    full_lr: tuple[float, ...] = (1e-4, 3e-4)
    """Peak learning rates of full fine-tuning. Validation selects one for each size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "sizes", "rank", "prefix", "lr", "prefix_lr", "full_lr")
        if len(self.size_epochs) != len(self.sizes) or min(self.size_epochs) < 1:
            raise ValueError(
                f"size_epochs must be a positive number for each of the {len(self.sizes)} sizes, not "
                f"{' '.join(map(str, self.size_epochs))}"
            )


DEFAULTS = Config()
