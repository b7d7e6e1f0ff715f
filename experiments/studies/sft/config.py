"""The flags of the study."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import settings
from experiments.models.options import AttentionKernel, Remat
from experiments.training.runtime import Runtime

Target = Literal["attention", "feed-forward", "embedding", "head"]
Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BatchSizes:
    """How many sequences a step takes."""

    global_: Annotated[int, tyro.conf.arg(name="global")] = 8
    """Sequences a step, over all devices and processes."""

    accumulate: int = 1
    """Microbatches a step, one after another: the memory of one."""

    def __post_init__(self) -> None:
        if self.global_ < 1:
            raise ValueError(f"batch.global must be positive, not {self.global_}")
        if self.accumulate < 1:
            raise ValueError(f"batch.accumulate must be positive, not {self.accumulate}")


@dataclass(frozen=True)
class Config(Runtime):
    """A decoder fine-tuned by LoRA or DoRA on conversations, from one CPU to a TPU pod.

    Every worker of a pod runs the same command. The base is frozen, in bfloat16 or in four bits; what is learnt, and
    what checkpoints hold, is the adapter. Conversations are put in the words of the checkpoint's own chat template,
    packed into sequences, and the loss is on what the assistant says. The study writes texts before and after, the
    adapter (and in PEFT's format), and what it measured under --out. Interrupted or preempted, the same command
    resumes.
    """

    model: str = "tiny-llama"
    """The base: a directory in Hugging Face layout with tokenizer.json, a hub name, or what is shipped: tiny-llama,
    tiny-gpt2."""

    data: str = "debian_sections"
    """What to learn: debian_sections, which is shipped; a JSONL, TSV or Parquet file; a directory with train and
    validation files; or a data set's name on the hub. Records have messages (role and content), or prompt and
    completion."""

    validation: str | None = None
    """Other examples to evaluate on, likewise; None takes what the data have for it."""

    out: Path = Path("runs/sft")
    """Where everything is written; a run that is there already is resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even where a finished or interrupted run of the same settings is there."""

    method: Literal["lora", "dora"] = "lora"
    """How weights are adapted."""

    targets: tuple[Target, ...] = ("attention", "feed-forward")
    """Which weights are adapted: attention's projections, the feed-forward layers (of a mixture its experts), the
    embedding, the head."""

    rank: int = 16
    """Rank of the factors."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    adapter_dtype: Float = "float32"
    """Of the factors and of the optimizer's state."""

    quantize: Literal["none", "nf4", "int8"] = "none"
    """The format of the base's linear layers; nf4 is QLoRA's, with double quantisation."""

    dtype: Float = "float32"
    """Of the base's other weights, and of activations."""

    length: int = 128
    """Tokens of a sequence; longer examples are cut."""

    pack: bool = True
    """Whether a sequence holds several examples, which do not see each other."""

    batch: BatchSizes = field(default_factory=BatchSizes)
    """How many sequences a step takes."""

    epochs: int = 1
    """Passes over the training examples."""

    steps: int | None = None
    """The most steps; None makes all passes."""

    train_examples: int | None = None
    """How many training examples, from the beginning; None takes all."""

    validation_examples: int | None = 256
    """How many validation examples, which are evaluated after each pass and in the middle of a single one."""

    lr: float = 1e-3
    """Peak learning rate."""

    warmup: float = 0.03
    """Share of the steps in which the learning rate rises from 0; it falls linearly to 0 in the rest."""

    weight_decay: float = 0.0
    """AdamW's."""

    clip: float = 1.0
    """Largest global norm of a step's gradients."""

    dropout: float = 0.0
    """Of the adapter's input."""

    remat: Remat = "full"
    """What the backward pass computes again: see the models' options."""

    attention: AttentionKernel | Literal["auto"] = "auto"
    """The kernel of attention; auto is flash on a TPU where the length is a multiple of 128, xla elsewhere."""

    loss_chunk: int = 512
    """How many tokens of a sequence have logits at the same time."""

    optimizer_on_host: bool = False
    """Keep the optimizer's state in the host's memory."""

    samples: int = 2
    """How many validation prompts the model answers before and after training."""

    new_tokens: int = 32
    """The most tokens of an answer."""

    seed: int = 0
    """Of the initial factors, dropout and the order of the examples."""

    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "rank", "alpha", "length", "epochs", "clip", "loss_chunk", "checkpoint_every")
        settings.positive(self, "steps", "train_examples", "validation_examples", "new_tokens")
        settings.not_negative(self, "lr", "weight_decay", "samples", "seed")
        settings.share(self, "warmup", "dropout")
        if not self.targets:
            raise ValueError("targets must name something to adapt")
