"""Eight tasks on one base: adapters that train in one step and answer in one batch, next to full models."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Trains an adapter for each of eight tasks on one base in one step, next to a full fine-tuning for each task.

    The tasks are fields of Debian packages: section, language, role, interface, toolkit, use, data and architecture, by
    the packages' one-line descriptions. Then one batch answers the test examples of all tasks, each row with the
    adapter of its task. The table has test accuracies, bytes and seconds. The eight full models take 0.7 GB in --out.
    """

    STUDY = "experiments.studies.multitask.study"
    MINUTES = 20
    FAST: ClassVar = {
        "tasks": 3,
        "train_examples": 32,
        "validation_examples": 16,
        "test_examples": 16,
        "epochs": 1,
        "repeats": 1,
    }

    out: Path = Path("runs/multitask")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: three tasks, few examples."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2, which a
    Python package provides."""

    data: str = "debian_fields"
    """The data: debian_fields, which is shipped, or a directory with the tables train, validation and test as .tsv or
    .tsv.gz, each with a header, a column of labels for each task, and the text in the last column."""

    tasks: int | None = None
    """Number of tasks, from the first column. None uses all."""

    train_examples: int = 800
    """Number of training examples of each task, from the beginning."""

    validation_examples: int = 200
    """Number of validation examples of each task. They select the penalty of the heads."""

    test_examples: int = 400
    """Number of test examples of each task."""

    epochs: int = 2
    """Passes over the training examples."""

    batch_size: int = 16
    """Examples of each task per training step."""

    length: int = 20
    """The length, in tokens, that texts are padded or truncated to. 99 % of the synopses have at most 20."""

    rank: int = 8
    """Rank of the LoRA factors, on all linear layers."""

    alpha: float = 16.0
    """The update is scaled by alpha / rank."""

    lr: float = 3e-3
    """Peak learning rate of LoRA: the quickstart's."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning: the quickstart's."""

    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    clip: float = 1.0
    """Maximum global norm of each task's gradients."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    rows: int = 16
    """Rows of each task in the batch that answers all tasks."""

    repeats: int = 2
    """Passes over the test examples that are timed."""

    checkpoint_every: int = 100
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "tasks", "train_examples", "validation_examples", "test_examples", "epochs")
        settings.positive(self, "batch_size", "rank", "alpha", "lr", "full_lr", "clip", "rows", "repeats")
        settings.positive(self, "checkpoint_every")
        settings.not_negative(self, "seed")
        settings.fraction(self, "warmup")
        if self.length < 3:
            raise ValueError(f"length must be at least 3, not {self.length}: a first and a last special token")

    @property
    def label_smoothing(self) -> float:
        """None: it would also raise the classes that a task does not have."""
        return 0.0


DEFAULTS = Config()
