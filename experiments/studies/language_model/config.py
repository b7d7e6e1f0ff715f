"""The flags of the study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments import settings

Family = Literal["gpt2", "llama"]
Target = Literal["attention", "feed-forward", "norms", "embedding", "head"]


@dataclass(frozen=True)
class Config:
    """Debian package synopses from the name of their archive section, by a language model adapted by LoRA.

    The base is a checkpoint with random weights and a real tokenizer, which is shipped: all that the model knows in
    the end is in the adapter. The study trains it, compares perplexity and texts with the base's, merges it into a
    checkpoint that transformers opens, writes it in PEFT's format, reads both back, and says by how much what they
    compute differs.

    The default takes less than a minute on 2 CPU cores. It writes the checkpoint, the adapter, a JSON and a picture
    under --out. Interrupted, the same command resumes.
    """

    family: tyro.conf.SuppressFixed[tyro.conf.Fixed[Family]]
    """The architecture: which models can be the base."""

    model: str
    """The base: a directory in Hugging Face layout with tokenizer.json, a hub name, or what is shipped: tiny-llama,
    tiny-gpt2."""

    targets: tuple[Target, ...]
    """What is adapted: by LoRA attention, feed-forward, embedding, head (where it is not the embedding); outright
    norms."""

    out: Path
    """Where everything is written; a run that is there already is resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even where a finished or interrupted run of the same settings is there."""

    data: str = "debian_sections"
    """What to learn: debian_sections, which is shipped, or a directory with labels.txt and train, validation and test
    as .tsv or .tsv.gz, each with a header, the label (the prompt) in the first column, the text in the last."""

    train_examples: int | None = None
    """How many training examples, from the beginning of the file; None takes all."""

    validation_examples: int | None = 500
    """How many validation examples; they draw the picture's points."""

    test_examples: int | None = 1000
    """How many test examples, on which perplexities and logits are compared."""

    epochs: int = 2
    """Passes over the training examples."""

    batch_size: int = 32
    """Examples a training step."""

    lengths: tuple[int, ...] = (40,)
    """The lengths, in tokens, that texts are padded to; longer texts are cut to the last. One compilation each."""

    rank: int = 16
    """Rank of the LoRA factors."""

    alpha: float = 32.0
    """LoRA's update is scaled by alpha / rank."""

    lr: float = 1e-2
    """Peak learning rate."""

    warmup: float = 0.06
    """Share of the steps in which the learning rate rises from 0; it falls linearly to 0 in the rest."""

    clip: float = 1.0
    """Largest global norm of a step's gradients."""

    loss_chunk: int = 20
    """How many tokens of a text have logits at the same time in a training step."""

    new_tokens: int = 32
    """The most tokens that are generated for a prompt."""

    samples: int = 4
    """How many of the generated texts are shown."""

    seed: int = 0
    """Of the initial factors and the order of the examples."""

    checkpoint_every: int = 100
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.positive(self, "epochs", "batch_size", "rank", "alpha", "clip", "loss_chunk", "new_tokens")
        settings.positive(self, "checkpoint_every", "train_examples", "validation_examples", "test_examples")
        settings.not_negative(self, "lr", "samples", "seed")
        settings.share(self, "warmup")
        settings.lengths(self)
        if not self.targets:
            raise ValueError("targets must name something to adapt")
