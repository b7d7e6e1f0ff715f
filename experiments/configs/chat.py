"""Talks to a base and an adapter in the terminal."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings
from experiments.configs.decoder import Float, Quantization


@dataclass(frozen=True)
class Config:
    """Talks to a base and to an adapter in the terminal.

    Answers are printed while they are generated. /base and /adapter switch between the two models within a
    conversation, /help lists all commands. Model, chat template and system message are those that `sft` recorded with
    the adapter, unless they are set here.

    If the standard input is not a terminal, each line is a message, and each answer is printed as one line: its line
    breaks become spaces.
    """

    STUDY = "experiments.studies.chat"
    MINUTES = None

    adapter: Path | None = None
    """The adapter: a directory that lora_jax or PEFT wrote, or the output directory of a run of sft, whose best adapter
    is used. None talks to the base only."""

    model: str | None = None
    """The base, named as for sft. None uses the one that is recorded with the adapter."""

    system: str | None = None
    """The system message. None uses the one of the adapter's training examples; empty uses none."""

    temperature: float = 0.0
    """The temperature of sampling; 0 selects the likeliest tokens."""

    top_p: float = 1.0
    """Sampling keeps the likeliest tokens until their total probability reaches this."""

    new_tokens: int = 256
    """Maximum number of tokens per answer."""

    seed: int = 0
    """Random seed of sampling."""

    quantize: Quantization | None = None
    """The quantization of the base's linear layers; see sft. None uses the one that is recorded with the adapter."""

    dtype: Float | None = None
    """The dtype of activations and of the base's weights that are not quantized. None uses the recorded one."""

    template: str | None = None
    """A chat template; see sft. None uses the recorded one, or the checkpoint's default."""

    def __post_init__(self) -> None:
        settings.positive(self, "new_tokens")
        settings.not_negative(self, "temperature", "seed")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


DEFAULTS = Config()
