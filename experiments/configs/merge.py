"""Merges an adapter into its base."""

from dataclasses import dataclass
from pathlib import Path

from experiments.configs.decoder import Float
from experiments.training.runtime import Runtime


@dataclass(frozen=True)
class Config(Runtime):
    """Merges an adapter into its base and writes a checkpoint with tokenizer, which transformers loads.

    The base may be a GGUF file or quantized: the merged checkpoint has floats. `lora-jax merge` does the same for
    adapters and bases that are both in Hugging Face's layout, file by file.
    """

    STUDY = "experiments.studies.merge"
    MINUTES = 1

    adapter: Path | None = None
    """The adapter: a directory that lora_jax or PEFT wrote, or the output directory of a run of sft, whose best adapter
    is used. Required."""

    model: str | None = None
    """The base, named as for sft. None uses the one that is recorded with the adapter."""

    dtype: Float | None = None
    """The dtype of the merged weights; sums are computed in float32. None uses the one that is recorded with the
    adapter."""

    out: Path = Path("runs/merged")
    """The new directory of the checkpoint."""


DEFAULTS = Config()
