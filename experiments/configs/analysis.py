"""What LoRA, DoRA and full fine-tuning do to the weights of a real model."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings

STUDY = "experiments.studies.analysis"


@dataclass(frozen=True)
class Config:
    """Subspaces, amplification, and changes of direction and magnitude in all-MiniLM-L6-v2's query and value.

    Trains five short runs on the quickstart's data from the same converged head: LoRA of a small rank, of a large one
    with two seeds, DoRA, and full fine-tuning. Then it compares subspaces (LoRA paper, §7.2 and appendix H),
    measures amplification (§7.3), and how far direction and magnitude move and go together (DoRA paper, §3.2).

    In every layer the first direction of one seed lies largely among the 64 of another (φ from 0.4 to 0.9; random
    matrices 0.2 at most), all 64 of both share hardly more than random ones, and so do W and ΔW. ΔM and ΔD go together
    in LoRA (correlations 0.93 to 1.00 for query and value, over layers and steps) more than in DoRA (0.7); full
    fine-tuning has 0.73 and 0.93.

    The default takes about 9 minutes of one CPU core. It writes three pictures and a JSON under --out. Interrupted,
    the same command resumes.
    """

    rank: int = 8
    """The small rank of the LoRA factors, and DoRA's."""

    large_rank: int = 64
    """The large rank."""

    alpha: float = 16.0
    """LoRA's update is scaled by alpha / rank, for both ranks."""

    layer: int = 3
    """The layer whose subspaces are drawn, from 0; the JSON has all."""

    out: Path = Path("runs/analysis")
    """Where everything is written; a run that is there already is resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even where finished or interrupted runs of the same settings are there."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a hub name, or all-MiniLM-L6-v2, which a package
    carries."""

    data: str = "debian_sections"
    """What to learn: debian_sections, which is shipped, or a directory as the quickstart takes it."""

    train_examples: int | None = 1500
    """How many training examples, from the beginning of the file; None takes all."""

    validation_examples: int | None = 500
    """How many validation examples, and as many of the test examples, by which the head is judged."""

    epochs: int = 3
    """Passes over the training examples; what changes is measured after each."""

    batch_size: int = 32
    """Examples a training step."""

    lengths: tuple[int, ...] = (14, 40)
    """The lengths, in tokens, that texts are padded to; longer texts are cut to the last. One compilation each."""

    lora_lr: float = 3e-3
    """Peak learning rate of LoRA and DoRA."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning."""

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
