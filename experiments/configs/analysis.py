"""How LoRA, DoRA and full fine-tuning change weights."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Analyzes subspaces, amplification, direction and magnitude in the query and value weights of all-MiniLM-L6-v2.

    Trains five short runs on the quickstart's data from the same converged head: LoRA with a small rank, LoRA with a
    large rank and two seeds, DoRA, and full fine-tuning. Then it compares subspaces (LoRA paper, §7.2 and appendix H),
    measures amplification (§7.3), and correlates the changes of direction and magnitude (DoRA paper, §3.2).

    In every layer the first direction of one seed is largely contained in the 64 directions of the other (φ from 0.4 to
    0.9; at most 0.2 for random matrices). All 64 directions of both seeds overlap hardly more than random ones, and so
    do those of W and ΔW. ΔM and ΔD are more correlated in LoRA (0.93 to 1.00 for query and value, over layers and
    steps) than in DoRA (0.7); in full fine-tuning their correlations are 0.73 and 0.93.

    The default takes about 9 minutes of one CPU core. It writes three plots and a JSON record to --out. After an
    interruption, the same command resumes.
    """

    STUDY = "experiments.studies.analysis"
    MINUTES = 9

    rank: int = 8
    """The small LoRA rank, and DoRA's rank."""

    large_rank: int = 64
    """The large LoRA rank."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank, for both ranks. The quickstart has 16 too, as the findings above."""

    layer: int = 3
    """The layer whose subspaces are plotted, from 0. The JSON record has all layers."""

    out: Path = Path("runs/analysis")
    """The output directory. A run that it already holds is resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2, which a
    Python package provides."""

    data: str = "debian_sections"
    """The data: debian_sections, which is shipped, or a directory in the quickstart's format."""

    train_examples: int | None = 1500
    """Number of training examples, from the beginning of the file. None uses all."""

    validation_examples: int | None = 500
    """Number of validation examples, and of the test examples that evaluate the head. None uses all."""

    epochs: int = 3
    """Passes over the training examples. The changes are measured after each."""

    batch_size: int = 32
    """Examples per training step."""

    lengths: tuple[int, ...] = (14, 40)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    lora_lr: float = 3e-3
    """Peak learning rate of LoRA and DoRA, as in the quickstart."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning, as in the quickstart."""

    checkpoint_every: int = 50
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.positive(self, "rank", "alpha", "epochs", "batch_size", "checkpoint_every", "lora_lr", "full_lr")
        settings.positive(self, "train_examples", "validation_examples")
        settings.not_negative(self, "layer")
        settings.lengths(self)
        if self.large_rank <= self.rank:
            raise ValueError(f"large_rank must be above rank ({self.rank}), not {self.large_rank}")


DEFAULTS = Config()
