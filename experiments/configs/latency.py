"""What an adapter adds to the time of a forward pass, and what switching tasks costs (LoRA paper, table 1)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Times a forward pass of GPT-2 medium with LoRA, merged and not, and with bottleneck adapters (LoRA, table 1).

    All variants alternate in one process; the table has the median of their ratios to the base. Then it times the
    ways to switch from one task to another, and counts the bytes of many tasks on disk. The weights are random.
    """

    STUDY = "experiments.studies.latency"
    MINUTES = 15
    FAST: ClassVar = {
        "layers": 1,
        "width": 64,
        "vocabulary": 256,
        "shapes": ("1x8", "2x16"),
        "rank": 2,
        "sizes": (4,),
        "repeats": 2,
    }

    layers: int = 24
    """Layers of the model."""

    width: int = 1024
    """Width of the model, a multiple of 64; a head has 64."""

    vocabulary: int = 50_257
    """Tokens of the vocabulary."""

    shapes: tuple[str, ...] = ("1x128", "2x256", "4x512")
    """Batches, each BATCHxLENGTH."""

    rank: int = 4
    """Rank of LoRA on query, key and value."""

    sizes: tuple[int, ...] = (6, 112, 224)
    """Sizes of bottleneck adapters. The paper's have 0.5M and 11M parameters."""

    tasks: int = 100
    """The number of tasks whose bytes are counted."""

    repeats: int = 7
    """Timed passes of each variant."""

    out: Path = Path("runs/latency")
    """The output directory."""

    fast: bool = False
    """The smallest complete study: a tiny model."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "layers", "width", "vocabulary", "rank", "sizes", "tasks", "repeats")
        if self.width % 64:
            raise ValueError(f"width must be a multiple of 64, not {self.width}")
        self.batches()

    def batches(self) -> list[tuple[int, int]]:
        """Returns batch size and length of each shape."""
        batches = []
        for shape in self.shapes:
            batch, _, length = shape.partition("x")
            if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
                raise ValueError(f"shapes: expected BATCHxLENGTH, as in 4x512, got {shape!r}")
            batches.append((int(batch), int(length)))
        return batches


DEFAULTS = Config()
