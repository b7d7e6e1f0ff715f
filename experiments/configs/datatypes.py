"""The perplexity of a base in several data types, before and after adaptation (QLoRA paper, tables 2 and 3)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from experiments import settings
from experiments.configs import presets
from experiments.configs.fine_tuning import FineTuning
from experiments.configs.qlora_scripts import FIXED, RANK, SCRIPTS

_FAST_PAPER: dict[str, Any] = {"length": 128, "rank": 2, "batch_size": 2}


@dataclass(frozen=True)
class Config(FineTuning):
    """Compares data types of the base by the perplexity of held-out text, before and after LoRA (QLoRA, tables 2, 3).

    The base as its GGUF file stores it (Q4_1 for SmolLM2), dequantized to float32, and quantized again to Int8, NF4,
    FP4 and Int4, with and without double quantization. The text is that of whole conversations: long descriptions of
    Debian packages and their synopses. A second figure shows how often each of the sixteen codes occurs.

    With --paper llama-7b, the base that --model names is adapted to the data that --data names (alpaca:DIRECTORY,
    oasst1:DIRECTORY or any other text) with the hyperparameters of the authors' scripts for 7B parameters. Flags that
    are set win. See docs/guides/data.md.
    """

    STUDY = "experiments.studies.datatypes"
    MINUTES = 30
    FAST: ClassVar = {"model": "tiny-llama", "data": ("debian_sections",), "steps": 2, "validation_examples": 2}

    model: str = "smollm2-135m"
    """The base, a model as for sft. As stored is measured if it is a GGUF file."""

    data: tuple[str, ...] = ("debian_synopses:0.04",)
    """The data, named as for sft."""

    validation_share: float = 0.0
    """Fraction of the training examples to hold out for validation, if the data has no validation examples."""

    paper: Literal["llama-7b"] | None = None
    """The setting of QLoRA's scripts for 7B parameters, with --model and --data."""

    rank: int = 16
    """Rank of the LoRA factors."""

    length: int | None = None
    """Tokens per sequence. None is sft's choice for the data."""

    template: str | None = None
    """A chat template for a model without one, as for sft."""

    steps: int | None = 24
    """Maximum number of training steps. None trains for all epochs."""

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
        if self.paper is None:  # otherwise preset() has set the values, and others are the user's
            settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        self.check_fine_tuning()
        settings.positive(self, "validation_examples", "lr", "rank", "length")
        settings.not_negative(self, "seed")
        settings.fraction(self, "validation_share")
        if self.paper and (self.model == type(self).model or self.data == type(self).data):
            raise ValueError(
                f"--paper {self.paper}: pass a model and text as in the original setting, for example --model "
                "huggyllama/llama-7b --data oasst1:DIRECTORY --validation-share 0.05"
            )

    def preset(self) -> Self:
        """Returns the settings of the paper's scripts for the model and the data, in place of the defaults."""
        return presets.preset(self, str(self.paper), SCRIPTS | FIXED | {"rank": RANK}, self.FAST | _FAST_PAPER)


DEFAULTS = Config()
