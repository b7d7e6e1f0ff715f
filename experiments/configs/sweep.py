"""LoRA's rank × learning rate on the quickstart's task, every pair trained at once over one base."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings

STUDY = "experiments.studies.sweep"


@dataclass(frozen=True)
class Config:
    """Debian packages to archive sections with all-MiniLM-L6-v2: which rank, which learning rate.

    All adapters of the grid are trained in one run by lora_jax.train_many, on the same batches; the base is there
    once. Validation accuracy chooses among them; the chosen one alone is tried on the test examples.

    The default takes under 10 minutes on 2 CPU cores and about 4 GB of memory. It writes the chosen adapter, a JSON
    and a heat map under --out. Interrupted, the same command resumes.
    """

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of LoRA on query and value."""

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates."""

    alpha: float = 16.0
    """LoRA's update is scaled by alpha / rank."""

    epochs: int = 1
    """Passes over the training examples."""

    seed: int = 0
    """Of the initial factors and the order of the examples."""

    out: Path = Path("runs/sweep")
    """Where everything is written; a sweep that is there already is resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even where a finished or interrupted sweep of the same settings is there."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a hub name, or all-MiniLM-L6-v2, which a package
    carries."""

    data: str = "debian_sections"
    """What to learn: debian_sections, which is shipped, or a directory with labels.txt and train, validation
    and test as .tsv or .tsv.gz, each with a header, the label in the first column, the text in the last."""

    train_examples: int | None = 2000
    """How many training examples, from the beginning of the file; None takes all."""

    validation_examples: int | None = 800
    """How many validation examples; they choose the head's penalty and the pair."""

    test_examples: int | None = 2000
    """How many test examples; the chosen adapter is tried on them once, at the end."""

    batch_size: int = 16
    """Examples a training step."""

    lengths: tuple[int, ...] = (10, 14, 20, 40)
    """The lengths, in tokens, that texts are padded to; longer texts are cut to the last. One compilation
    each."""

    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0; it falls linearly to 0 in the rest."""

    label_smoothing: float = 0.1
    """Share of a label that is spread over all classes while training: a converged head is sure of itself."""

    clip: float = 1.0
    """Largest global norm of a step's gradients, for each adapter."""

    checkpoint_every: int = 25
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.positive(self, "epochs", "batch_size", "checkpoint_every", "clip", "alpha", "ranks", "learning_rates")
        settings.positive(self, "train_examples", "validation_examples", "test_examples")
        settings.not_negative(self, "seed")
        settings.share(self, "warmup", "label_smoothing")
        settings.lengths(self)

    @property
    def grid(self) -> list[tuple[int, float]]:
        """The pairs of rank and learning rate, in the order of the adapters."""
        return [(rank, lr) for rank in self.ranks for lr in self.learning_rates]


DEFAULTS = Config()
"""What a config runs, end to end."""
