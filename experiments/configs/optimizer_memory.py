"""What an optimizer's state costs, with full fine-tuning and with LoRA (LoRA paper, section 4.2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Measures the memory of training steps with SGD, momentum and Adam, and with LoRA, beside XLA's analysis.

    Each step of a Llama-shaped model in float32 runs in a process of its own, on one sequence with rematerialized
    layers. If libtpu is installed, the step of full fine-tuning with Adam is also compiled for a TPU v5p chip with
    short and long sequences, with the optimizer's state on the device and in the host's memory (QLoRA's paged
    optimizers).
    """

    STUDY = "experiments.benchmarks.optimizer_memory"
    MINUTES = 4
    FAST: ClassVar = {"layers": 1, "width": 64, "vocabulary": 256, "tokens": 16, "long": 32, "steps": 1}

    layers: int = 12
    """Layers of the model."""

    width: int = 768
    """Width of the model, a multiple of 64. The feed-forward layers have 8 / 3 of it, and a head has 64."""

    vocabulary: int = 8192
    """Tokens of the vocabulary."""

    tokens: int = 512
    """Length of the sequence."""

    long: int = 16_384
    """Length of the long sequence that is compiled for a TPU."""

    rank: int = 8
    """Rank of LoRA on all linear layers."""

    steps: int = 3
    """Measured steps."""

    out: Path = Path("runs/optimizer-memory")
    """The output directory."""

    fast: bool = False
    """The smallest complete study: a tiny model."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "layers", "width", "vocabulary", "tokens", "long", "rank", "steps")
        if self.width % 64:
            raise ValueError(f"width must be a multiple of 64, not {self.width}")


DEFAULTS = Config()
