"""A sentence encoder tuned for retrieval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from experiments import settings
from experiments.configs.method_names import separated_by_commas
from experiments.input.checking import OnBad
from experiments.training.runtime import Runtime

METHODS = ("lora", "dora", "full")
Methods = Annotated[tuple[str, ...], separated_by_commas(METHODS)]

FAST = {
    "methods": ("lora",),
    "steps": 2,
    "train_examples": 16,
    "validation_examples": 4,
    "test_examples": 8,
    "batch_size": 8,
    "lengths": (32,),
    "out": Path("runs/embed-fast"),
}
"""What `fast` sets, unless it is set otherwise."""


@dataclass(frozen=True)
class Config(Runtime):
    """Tunes all-MiniLM-L6-v2 to find a Debian package's synopsis by its long description, with LoRA and in full.

    Trains with in-batch negatives, and reports how often the right one of all test synopses is the nearest (recall@1)
    or among the ten nearest (recall@10), before and after. Test packages are of other sources than training packages.
    Every figure has its standard error, and the gain over the base that of paired differences.

    It writes adapters (LoRA also in PEFT's format, which sentence-transformers opens), a JSON record and a figure to
    --out. After an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.embed.study"
    MINUTES = 12

    methods: Methods = ("lora", "full")
    """The methods to compare, separated by commas: lora and dora (on every linear layer), full (fine-tuning of all
    weights)."""

    model: str = "all-MiniLM-L6-v2"
    """The base: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2, which a
    Python package provides. The vector of a text is the normalized mean of its tokens' vectors."""

    data: tuple[str, ...] = ("debian_synopses",)
    """The training pairs: files, directories or data sets on the Hugging Face Hub as for sft, or debian_synopses, which
    is shipped. Records have anchor and positive, query and document (both optionally with negatives), prompt and
    completion, or messages, of which the last question and answer are the pair."""

    on_bad: OnBad = "error"
    """What to do about a malformed record: stop before training with its file and line (error), or count it and leave
    it out (skip)."""

    validation: tuple[str, ...] = ()
    """The validation pairs. Empty uses the validation files next to the training files."""

    test: tuple[str, ...] = ()
    """The test pairs. Empty uses the test files next to the training files."""

    out: Path = Path("runs/embed")
    """The output directory. Runs that it already holds are resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete run: LoRA, two steps of eight pairs, eight test pairs."""

    quantize: Literal["none", "nf4", "fp4", "int8", "int4"] = "none"
    """The quantization of the base's linear layers for lora and dora; full fine-tuning trains float weights."""

    rank: int = 16
    """Rank of the factors, as in sft."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank. 32 is the choice of LoRA Without Regret, with which the best learning rate
    hardly depends on the rank."""

    lora_lr: float = 1e-3
    """Peak learning rate of LoRA and DoRA: ten times that of full fine-tuning (LoRA Without Regret)."""

    full_lr: float = 1e-4
    """Peak learning rate of full fine-tuning."""

    temperature: float = 0.05
    """The divisor of cosines in the loss, as in sentence-transformers (scale 20)."""

    epochs: int = 1
    """Passes over the training pairs."""

    steps: int | None = None
    """Maximum number of training steps. None trains for all epochs."""

    train_examples: int | None = 2000
    """Number of training pairs, from the beginning. None uses all."""

    validation_examples: int | None = 200
    """Number of validation pairs. None uses all."""

    test_examples: int | None = None
    """Number of test pairs, whose answers are all candidates. None uses all."""

    batch_size: int = 32
    """Pairs per step. Each query has the answers of the other pairs as negatives."""

    negatives: int = 1
    """Hard negatives of each query: those of its record, then the training answers that the base finds nearest to the
    right one. Random negatives of a batch are too easy for this data."""

    lengths: tuple[int, ...] = (64, 96)
    """The lengths, in tokens, that queries are padded to. Longer ones are truncated. Each length is compiled once."""

    answer_length: int = 24
    """The length, in tokens, that answers are padded to. Longer answers are truncated."""

    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    clip: float = 1.0
    """Maximum global norm of the gradients."""

    seed: int = 0
    """Random seed of the initial factors and the order of the pairs."""

    checkpoint_every: int = 50
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.use_fast(self, FAST)
        settings.positive(self, "rank", "alpha", "temperature", "epochs", "steps", "clip", "checkpoint_every")
        settings.positive(self, "train_examples", "validation_examples", "test_examples", "answer_length")
        settings.not_negative(self, "lora_lr", "full_lr", "seed", "negatives")
        settings.fraction(self, "warmup")
        settings.lengths(self)
        if self.train_examples is not None and self.train_examples <= self.negatives:
            raise ValueError(f"negatives {self.negatives} requires more train_examples than {self.train_examples}")
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, so that queries have negatives, not {self.batch_size}")


DEFAULTS = Config()
