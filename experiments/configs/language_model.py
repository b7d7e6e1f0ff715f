"""The config of the language model study; `gpt2_tiny` and `llama_tiny` are its instances."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments import settings

Family = Literal["gpt2", "llama"]
Target = Literal["attention", "feed-forward", "norms", "embedding", "head"]


@dataclass(frozen=True)
class Config:
    """Adapts a language model with LoRA to write a Debian package's synopsis from its archive section.

    The base is shipped and has random weights and a real tokenizer, so everything that the model learns is in the
    adapter. The study trains the adapter, compares perplexity and samples with the base's, merges it into a checkpoint
    for transformers, exports it in PEFT's format, reads both back, and reports how much their outputs differ.

    The default takes less than a minute on 2 CPU cores. It writes the checkpoint, the adapter, a JSON record and a plot
    to --out. After an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.language_model.study"
    MINUTES = 1

    family: tyro.conf.SuppressFixed[tyro.conf.Fixed[Family]]
    """The architecture of the base."""

    model: str
    """The base: a directory in Hugging Face layout with tokenizer.json, a GGUF file, a name on the Hugging Face Hub, or
    a model that is installed (smollm2-135m) or shipped (tiny-llama, tiny-gpt2)."""

    targets: tuple[Target, ...]
    """The weights to adapt: attention, feed-forward, embedding and head (unless tied to the embedding) with LoRA; norms
    by full fine-tuning."""

    out: Path
    """The output directory. A run that it already holds is resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds a finished or interrupted run with the same settings."""

    data: str = "debian_sections"
    """The data: debian_sections, which is shipped, or a directory with labels.txt and the splits train, validation and
    test as .tsv or .tsv.gz, each with a header, the label (the prompt) in the first column and the text in the last."""

    train_examples: int | None = None
    """Number of training examples, from the beginning of the file. None uses all."""

    validation_examples: int | None = 500
    """Number of validation examples. They give the validation losses in the plot. None uses all."""

    test_examples: int | None = 1000
    """Number of test examples, which compare perplexities and logits. None uses all."""

    epochs: int = 2
    """Passes over the training examples."""

    batch_size: int = 32
    """Examples per training step."""

    lengths: tuple[int, ...] = (40,)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    rank: int = 16
    """Rank of the LoRA factors."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    lr: float = 1e-2
    """Peak learning rate."""

    warmup: float = 0.06
    """Fraction of the steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    clip: float = 1.0
    """Maximum global norm of the gradients."""

    loss_chunk: int = 20
    """Tokens per text whose logits are computed at a time in a training step."""

    new_tokens: int = 32
    """Maximum number of tokens to generate per prompt."""

    samples: int = 4
    """Number of generated texts to show."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    checkpoint_every: int = 100
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.positive(self, "epochs", "batch_size", "rank", "alpha", "clip", "loss_chunk", "new_tokens")
        settings.positive(self, "checkpoint_every", "train_examples", "validation_examples", "test_examples")
        settings.not_negative(self, "lr", "samples", "seed")
        settings.fraction(self, "warmup")
        settings.lengths(self)
        if not self.targets:
            raise ValueError("targets is empty; expected at least one kind of weight to adapt")
