"""The perplexity of a base in several data types, before and after adaptation (QLoRA paper, tables 2 and 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Compares data types of the base by the perplexity of held-out text, before and after LoRA (QLoRA, tables 2, 3).

    The base as its GGUF file stores it (Q4_1 for SmolLM2), dequantized to float32, and quantized again to Int8, NF4,
    FP4 and Int4, with and without double quantization. The text is that of whole conversations: long descriptions of
    Debian packages and their synopses. A second figure shows how often each of the sixteen codes occurs.
    """

    STUDY = "experiments.studies.datatypes"
    MINUTES = 30
    FAST: ClassVar = {"model": "tiny-llama", "data": ("debian_sections",), "steps": 2, "validation_examples": 2}

    model: str = "smollm2-135m"
    """The base, a model as for sft. As stored is measured if it is a GGUF file."""

    data: tuple[str, ...] = ("debian_synopses:0.04",)
    """The data, named as for sft."""

    steps: int = 24
    """Training steps, of one sequence each."""

    validation_examples: int = 60
    """Number of validation examples."""

    lr: float = 1e-3
    """Peak learning rate."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/datatypes")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: a tiny model with random weights."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "steps", "validation_examples", "lr")
        settings.not_negative(self, "seed")


DEFAULTS = Config()
