"""How few coordinates of a random subspace are enough (Aghajanyan et al., 2020; Li et al., 2018)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings
from experiments.configs.comparison import Comparison


@dataclass(frozen=True)
class Config(Comparison):
    """Measures the intrinsic dimension d₉₀: how few coordinates z reach 90 % of full fine-tuning with θ₀ + P(z).

    P is a random projection (Fastfood), plain (Li et al.) or with a trained scale for each layer (SAID, Aghajanyan et
    al.), which counts as a coordinate. θ₀ is the pretrained model with the converged head; head and layers move, the
    embeddings do not. Since that head alone scores high, a second threshold is 90 % of what full fine-tuning gains over
    it. d₉₀ is the smallest of the dimensions whose mean test accuracy reaches a threshold, and 0 if the head alone
    does. Here all-MiniLM-L6-v2 classifies Debian packages.

    There is no --paper: learning rates depend on the projection, and validation selects them here.
    """

    STUDY = "experiments.studies.intrinsic"
    MINUTES = 20
    FAST: ClassVar = {"dimensions": (16, 32)}

    out: Path = Path("runs/intrinsic")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    train_examples: int | None = 1600
    """Number of training examples, from the beginning of the file. None uses all."""

    dimensions: tuple[int, ...] = (128, 1024, 8192)
    """The numbers of trained coordinates."""

    lr: tuple[float, ...] = (0.1, 0.3)
    """Peak learning rates of the coordinates, times the root of their number: about the distance that a step moves all
    weights. Validation selects one for each row."""

    full_lr: tuple[float, ...] = (1e-4, 3e-4)
    """Peak learning rates of full fine-tuning. Validation selects one."""

    batch_size: int = 32
    """Examples per training step. The projection of a step costs as much for few examples as for many."""

    lengths: tuple[int, ...] = (24,)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "dimensions", "lr", "full_lr")
        if list(self.dimensions) != sorted(set(self.dimensions)):
            raise ValueError(f"dimensions must be ascending, not {' '.join(map(str, self.dimensions))}")


DEFAULTS = Config()
