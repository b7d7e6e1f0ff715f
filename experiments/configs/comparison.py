"""The settings that studies share which compare methods on a task of sentences, or pairs of sentences."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from experiments import settings
from experiments.configs.papers import Preset
from experiments.training.runtime import Runtime


@dataclass(frozen=True)
class Comparison(Runtime):
    """A base class of configs.

    A subclass names its study, its minutes and the values of `fast` that differ from :data:`FAST`. In `out`, a
    subclass states its directory.
    """

    STUDY: ClassVar[str]
    MINUTES: ClassVar[int]
    FAST: ClassVar[dict[str, object]] = {}

    out: Path = Path("runs/comparison")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: few examples, one seed, small settings."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT, RoBERTa, DeBERTa and so on), a name on the Hugging Face Hub,
    or all-MiniLM-L6-v2, which a Python package provides."""

    data: str = "debian_sections"
    """The data: debian_sections, which is shipped; a directory in the quickstart's format; or one of GLUE's tasks, as
    in glue/rte:DIRECTORY, or glue/rte on the Hugging Face Hub. GLUE's test labels are secret: the table is of the
    development examples, and the validation examples are held out from training, at most a tenth."""

    train_examples: int | None = 2000
    """Number of training examples, from the beginning of the file. None uses all."""

    validation_examples: int | None = 500
    """Number of validation examples. They select the head's penalty and the learning rates. None uses all."""

    test_examples: int | None = 1000
    """Number of test examples, which every run is evaluated on, at its end. None uses all."""

    seeds: int = 3
    """Runs of each row. The table shows their mean and standard deviation."""

    seed: int = 0
    """The first random seed, of the initial factors and the order of the examples."""

    epochs: int = 1
    """Passes over the training examples."""

    batch_size: int = 16
    """Examples per training step."""

    lengths: tuple[int, ...] = (14, 40)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank. 32 for every rank is the choice of LoRA Without Regret."""

    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    label_smoothing: float = 0.1
    """Label smoothing in training: the probability that is spread evenly over the classes. The converged head that
    training starts from is overconfident."""

    clip: float = 1.0
    """Maximum global norm of each run's gradients."""

    weight_decay: float = 0.0
    """Weight decay of AdamW; 0 is Adam."""

    checkpoint_every: int = 50
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._use_fast()
        settings.positive(self, "train_examples", "validation_examples", "test_examples", "seeds", "epochs")
        settings.positive(self, "batch_size", "alpha", "clip", "checkpoint_every")
        settings.not_negative(self, "seed", "weight_decay")
        settings.fraction(self, "warmup", "label_smoothing")
        settings.lengths(self)

    def _use_fast(self) -> None:
        """Sets the values of `fast` if it is set."""
        settings.use_fast(self, FAST | {"out": Path(f"{type(self).out}-fast")} | self.FAST)


@dataclass(frozen=True)
class PaperComparison(Comparison):
    """A base class of configs that have the settings of papers.

    A subclass states the names of its presets in `paper`.
    """

    PRESETS: ClassVar[Mapping[str, Preset]]

    paper: str | None = None
    """The setting of a paper. In Python, :meth:`preset` sets its values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paper is not None and self.paper not in self.PRESETS:
            raise ValueError(f"paper must be one of {', '.join(self.PRESETS)}, not {self.paper}")

    def preset(self) -> Self:
        """Returns the settings of the paper for the model and the data, in place of the defaults.

        Those of `fast` win over the paper's.

        Raises:
          UserError: Model or data are not those of the paper.
        """
        assert self.paper is not None
        kind, task = type(self), self.task()
        out = f"{kind.out}-{self.paper}-{task}"
        values = self.PRESETS[self.paper].fields(task) | {"out": Path(out)}
        if self.fast:
            values |= FAST | self.FAST | {"out": Path(f"{out}-fast")}
        return kind(paper=self.paper, model=self.model, data=self.data, fast=self.fast, **values)

    def task(self) -> str:
        """Returns the task of GLUE that `data` means in the setting of the paper.

        Raises:
          UserError: Model or data are not those of the paper.
        """
        assert self.paper is not None
        return self.PRESETS[self.paper].task(self.paper, self.model, type(self).model, self.data)

    def _use_fast(self) -> None:
        if self.paper is None:  # otherwise preset() has set the values, and others are the user's
            super()._use_fast()


FAST = {
    "train_examples": 48,
    "validation_examples": 32,
    "test_examples": 32,
    "seeds": 1,
    "epochs": 1,
    "lengths": (14,),
}
"""What `fast` sets in every comparison, unless it is set otherwise."""
