"""A sweep over LoRA's rank and learning rate."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Selects LoRA's rank and learning rate for the quickstart's task.

    lora_jax.train_many trains all adapters of the grid in one run, on the same batches and one copy of the base.
    Validation accuracy selects an adapter; only that one is evaluated on the test examples.

    The default takes under 10 minutes on 2 CPU cores and about 4 GB of memory. It writes the selected adapter, a JSON
    record and a heat map to --out. After an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.sweep"
    MINUTES = 10

    ranks: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks of LoRA on query and value, up to the quickstart's."""

    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates, around the 1.8e-3 of the published rule (LoRA Without Regret; see `lr-sweep`)."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank. With 32 for every rank, the best learning rate hardly depends on the rank
    (LoRA Without Regret)."""

    epochs: int = 1
    """Passes over the training examples."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/sweep")
    """The output directory. A sweep that it already holds is resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds a finished or interrupted sweep with the same settings."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2, which a
    Python package provides."""

    data: str = "debian_sections"
    """The data: debian_sections, which is shipped, or a directory with labels.txt and the splits train, validation and
    test as .tsv or .tsv.gz, each with a header, the label in the first column and the text in the last."""

    train_examples: int | None = 2000
    """Number of training examples, from the beginning of the file. None uses all."""

    validation_examples: int | None = 800
    """Number of validation examples. They select the head's penalty and the adapter. None uses all."""

    test_examples: int | None = 2000
    """Number of test examples. The selected adapter is evaluated on them once, at the end. None uses all."""

    batch_size: int = 16
    """Examples per training step."""

    lengths: tuple[int, ...] = (10, 14, 20, 40)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    label_smoothing: float = 0.1
    """Label smoothing in training: the probability that is spread evenly over the classes. The converged head that
    training starts from is overconfident."""

    clip: float = 1.0
    """Maximum global norm of each adapter's gradients."""

    checkpoint_every: int = 25
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.positive(self, "epochs", "batch_size", "checkpoint_every", "clip", "alpha", "ranks", "learning_rates")
        settings.positive(self, "train_examples", "validation_examples", "test_examples")
        settings.not_negative(self, "seed")
        settings.fraction(self, "warmup", "label_smoothing")
        settings.lengths(self)

    @property
    def grid(self) -> list[tuple[int, float]]:
        """The pairs of rank and learning rate, in the order of the adapters."""
        return [(rank, lr) for rank in self.ranks for lr in self.learning_rates]


DEFAULTS = Config()
