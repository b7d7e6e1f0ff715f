"""What fine-tuning of a decoder forgets, by method."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Compares methods by what a decoder learns of a new task and forgets of other text, as PEFT's comparison does.

    LoRA of several ranks and learning rates, LoRA on attention alone, DoRA and full fine-tuning learn synopses of
    Debian packages. The gain is the decrease of the loss of held-out synopses. The other text is the language reference
    of Python, which ships with Python and which the base knows; the increase of its loss is what was forgotten. Both
    have standard errors over the examples, paired with those of the base.
    """

    STUDY = "experiments.studies.forgetting.study"
    MINUTES = 45
    FAST: ClassVar = {
        "model": "tiny-llama",
        "data": ("debian_sections",),
        "ranks": (2,),
        "lr": (1e-3,),
        "full_lr": (1e-4,),
        "steps": 2,
        "length": 128,
        "examples": 4,
        "characters": 100,
    }

    model: str = "smollm2-135m"
    """The base, a model as for sft."""

    data: tuple[str, ...] = ("debian_synopses:0.04",)
    """The data of the new task, named as for sft; it needs test or validation examples."""

    ranks: tuple[int, ...] = (2, 16)
    """Ranks of LoRA on all linear layers. DoRA, and LoRA on attention alone, have the largest."""

    lr: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates of LoRA at each rank. DoRA, and LoRA on attention alone, train with the largest."""

    full_lr: tuple[float, ...] = (1e-4, 3e-4)
    """Peak learning rates of full fine-tuning."""

    steps: int = 48
    """Training steps, of one sequence each."""

    length: int = 256
    """Tokens per sequence."""

    examples: int = 40
    """Number of held-out examples of the new task, and at most as many texts of the language reference."""

    characters: int = 1000
    """Characters of each text of the language reference. The loss is that of its second half."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/forgetting")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: a tiny model with random weights."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "ranks", "lr", "full_lr", "steps", "length", "examples", "characters")
        settings.not_negative(self, "seed")


DEFAULTS = Config()
