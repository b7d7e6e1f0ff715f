"""The flags of the study."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments import settings
from experiments.input.checking import OnBad
from experiments.input.encoding import Options
from experiments.input.forms import FormName
from experiments.input.template_files import parse_arguments
from experiments.input.turns import TrainOn
from experiments.models.options import AttentionKernel, Remat
from experiments.training.optimizer import Schedule
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

    Every worker of a pod runs the same command. The base is frozen, in bfloat16 or in four bits; what is learned, and
    what checkpoints hold, is the adapter. Conversations are put in the words of the checkpoint's own chat template,
    packed into sequences, and the loss is on what the assistant says. The study writes texts before and after, the
    adapter (and in PEFT's format), and what it measured under --out. Interrupted or preempted, the same command
    resumes.
    """

    model: str = "tiny-llama"
    """The base: a directory in Hugging Face layout with tokenizer.json, a hub name, or what is shipped: tiny-llama,
    tiny-gpt2."""

    data: tuple[str, ...] = ("debian_sections",)
    """What to learn: files, globs of files, directories with train and validation files, data sets of the hub
    (ORG/NAME:SPLIT), or debian_sections, which is shipped. Several are joined; each may end in :WEIGHT, how often its
    examples are seen in a pass, as in a.jsonl:3 b.parquet:0.5."""

    data_form: FormName | None = None
    """The format of the records; None detects it by their columns: messages (chat), conversations (sharegpt),
    instruction and output (alpaca), prompt and completion, text."""

    on_bad: OnBad = "error"
    """What to do about a malformed record: end before training with its file and line, or count it and leave it out."""

    validation: tuple[str, ...] = ()
    """Other examples to evaluate on, named likewise; without, those beside the training files, if any."""

    validation_share: float = 0.0
    """Share of the training examples that is held out to validate with, where the data have no examples for it."""

    out: Path = Path("runs/sft")
    """Where everything is written. A run that is there already is shown, not repeated; an interrupted one resumes, and
    a finished one goes on where --epochs, --steps, --max-minutes or --patience ask for more."""

    fresh: bool = False
    """Start over, even where a finished or interrupted run of the same settings is there."""

    init_from: Path | None = None
    """Start from an adapter: a directory that lora_jax or PEFT wrote. Method, targets, ranks, alpha and dropout are the
    adapter's."""

    method: Literal["lora", "dora"] = "lora"
    """How weights are adapted."""

    targets: tuple[Target, ...] = ("attention", "feed-forward")
    """Which weights are adapted: attention's projections, the feed-forward layers (of a mixture its experts), the
    embedding, the head."""

    rank: int = 16
    """Rank of the factors."""

    ranks: tuple[str, ...] = ()
    """Other ranks by pattern, as in attention=8 feed_forward/down=32: a regular expression that is searched in the path
    of a weight; the first that matches counts."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    adapter_dtype: Float = "float32"
    """Of the factors and of the optimizer's state."""

    quantize: Literal["none", "nf4", "int8"] = "none"
    """The format of the base's linear layers; nf4 is QLoRA's, with double quantization."""

    dtype: Float = "float32"
    """Of the base's other weights, and of activations."""

    template: str | None = None
    """A chat template in place of the checkpoint's own: a file, its text, or the name of one of the checkpoint's."""

    template_arguments: tuple[str, ...] = ()
    """Variables for the chat template: a JSON object, or NAME=VALUE, as in enable_thinking=false."""

    train_on: TrainOn = "answers"
    """What is learned: all answers of the assistant (or completions), the last answer, or the whole text."""

    control_tokens: Literal["text", "parse"] = "text"
    """What text of a record that spells a control token is: text, or that token."""

    tokenize_together: bool = False
    """Tokenize prompt and answer as one text: a token may then lie across the boundary, which a model that is prompted
    does not see."""

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

    max_minutes: float | None = None
    """Training ends after this time, evaluations and compilation included, and the adapter is written."""

    patience: int | None = None
    """Early stopping: training ends when so many evaluations in a row have brought no better validation loss."""

    train_examples: int | None = None
    """How many training examples, from the beginning; None takes all."""

    validation_examples: int | None = 256
    """How many validation examples."""

    eval_every: int | None = None
    """Steps between evaluations; None evaluates after each pass, and in the middle of a single one."""

    log_every: int = 1
    """Steps between lines of metrics.jsonl and TensorBoard events; the loss is the mean of the steps between."""

    lr: float = 1e-3
    """Peak learning rate."""

    schedule: Schedule = "linear"
    """How the learning rate goes on after it has risen: it falls to the floor, linearly or along a cosine; stays
    constant; or (wsd) stays, and falls linearly in the last steps."""

    warmup: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""

    lr_floor: float = 0.0
    """The last learning rate, as a share of the peak."""

    decay: float = 0.1
    """Share of the steps in which the schedule wsd falls."""

    weight_decay: float = 0.0
    """AdamW's, for factors; magnitudes do not decay."""

    clip: float | None = 1.0
    """Largest global norm of a step's gradients; None does not clip."""

    dropout: float = 0.0
    """Of the adapter's input."""

    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over the vocabulary, in training."""

    neftune: float = 0.0
    """Scale of NEFTune's noise on the embedded tokens in training; 5 is usual, 0 adds none."""

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
        for name in ("data", "validation"):  # one name may be given as it is
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.data:
            raise ValueError("data must name something to learn")
        settings.positive(self, "rank", "alpha", "length", "epochs", "clip", "loss_chunk", "checkpoint_every")
        settings.positive(self, "steps", "train_examples", "validation_examples", "new_tokens")
        settings.positive(self, "max_minutes", "patience", "eval_every", "log_every")
        settings.not_negative(self, "lr", "weight_decay", "samples", "seed", "neftune")
        settings.share(self, "warmup", "dropout", "label_smoothing", "validation_share")
        if self.length >= 2**31:
            raise ValueError(f"length must be below 2**31, not {self.length}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor is a share of the peak, from 0 to 1, not {self.lr_floor}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a share of the steps, above 0 and up to 1, not {self.decay}")
        if not self.targets:
            raise ValueError("targets must name something to adapt")
        if self.validation and self.validation_share:
            raise ValueError("validation and validation_share: give one of them")
        self.rank_patterns()
        parse_arguments(self.template_arguments)
        if self.init_from is not None:
            defaults = {field.name: field.default for field in dataclasses.fields(Config)}
            changed = [name for name in OF_ADAPTER if getattr(self, name) != defaults[name]]
            if changed:
                raise ValueError(f"--init-from: {', '.join(changed)} would be the adapter's; leave out one of the two")

    def encoding(self) -> Options:
        """How records become tokens."""
        return Options(
            self.template,
            parse_arguments(self.template_arguments),
            self.train_on,
            self.control_tokens,
            self.tokenize_together,
        )

    def rank_patterns(self) -> dict[str, int]:
        """`ranks` as a dict from patterns to ranks."""
        patterns = {}
        for text in self.ranks:
            pattern, equals, rank = text.rpartition("=")
            if not equals or not pattern or not rank.isdecimal() or int(rank) < 1:
                raise ValueError(f"ranks are PATTERN=RANK, as in attention=8, not {text!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"ranks: {pattern!r} is no regular expression ({error})") from None
            patterns[pattern] = int(rank)
        return patterns


OF_ADAPTER = ("method", "targets", "rank", "ranks", "alpha", "dropout")
"""Settings that an adapter brings along."""
