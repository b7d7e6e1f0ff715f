"""A chat model fine-tuned on conversations."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from experiments import settings
from experiments.configs import presets
from experiments.configs.decoder import BatchSizes, DecoderConfig, Quantization
from experiments.configs.method_names import separated_by_commas
from experiments.evaluation.decoding import Decoding
from experiments.input.options import Options, TrainOn

METHODS: dict[str, tuple[Literal["lora", "dora", "full"], Quantization]] = {
    "lora": ("lora", "none"),
    "dora": ("dora", "none"),
    "qlora": ("lora", "nf4"),
    "qdora": ("dora", "nf4"),
    "stored": ("lora", "stored"),
    "full": ("full", "none"),
}
"""The adapter method and the quantization of each of the methods that a run may compare."""

Methods = Annotated[tuple[str, ...], separated_by_commas(tuple(METHODS))]

_COMMONSENSE: dict[str, Any] = {
    "methods": ("dora",),
    "targets": ("query", "key", "value", "up", "down"),
    "rank": 32,
    "alpha": 64.0,
    "dropout": 0.05,
    "lr": 1e-4,
    "batch": BatchSizes(16),
    "epochs": 3,
    "warmup": 100,
    "length": 256,
    "dtype": "bfloat16",  # the authors' is float16
    "train_on": "all",
    "pack": False,
    "validation_share": 120 / 170_420,  # of which one evaluation in 80 steps chooses the adapter
    "eval_every": 80,
    "test_examples": None,
    "beams": 4,
    "new_tokens": 32,
}
"""The setting of LLaMA 7B (DoRA, table 8, and the authors' scripts)."""

_FAST_PAPER: dict[str, Any] = {"rank": 2, "batch": BatchSizes(2), "eval_every": 2, "warmup": 1, "new_tokens": 4}


@dataclass(frozen=True)
class Config(Decoding, DecoderConfig):
    """Fine-tunes a decoder on conversations with LoRA, DoRA or in full, on anything from one CPU to a TPU pod.

    Every worker of a pod runs the same command. The base is frozen, in bfloat16 or in four bits; only the adapter is
    trained and checkpointed (with --method full, a copy of all weights). Conversations are rendered with the
    checkpoint's chat template and packed into sequences, and the loss covers the assistant's answers. The study writes
    sample answers from before and after training, the adapter (also in PEFT's format) and all measurements to --out.
    After an interruption or preemption, the same command resumes.
    """

    STUDY = "experiments.studies.sft.comparison"
    CHECK = "experiments.studies.sft.splits"
    MINUTES = 10
    FAST: ClassVar[Mapping[str, Any]] = {
        "steps": 2,
        "samples": 2,
        "validation_examples": 2,
        "test_examples": 2,
        "out": Path("runs/sft-fast"),
    }
    SWEPT: ClassVar[Mapping[str, float]] = {"smollm2-135m": 3e-3}  # of some 100 steps of one sequence

    data: tuple[str, ...] = ("debian_synopses:0.06",)
    """The training data: files, globs, directories with train and validation files, data sets on the Hugging Face Hub
    (ORG/NAME:SPLIT), data sets of papers as they are distributed (a directory, NAME:DIRECTORY or NAME on the Hub, with
    the names e2e, wikisql, samsum, commonsense, alpaca, oasst1, guanaco, squad, squad-v2, glue/rte and so on), or
    debian_synopses or debian_sections, which are shipped. Several are concatenated. Each may end in :WEIGHT, how often
    its examples are seen per epoch, as in a.jsonl:3 b.parquet:0.5. The default is 6 % of debian_synopses, for a run of
    some minutes on two CPU cores."""

    out: Path = Path("runs/sft")
    """The output directory. If it holds a finished run with the same settings, its results are shown, and training
    continues only if --epochs, --steps, --max-minutes or --patience allow more. An interrupted run resumes."""

    methods: Methods = ()
    """Methods to compare in one table, separated by commas: lora, dora, qlora (LoRA on a base in NF4), qdora, stored
    (LoRA on the codes of a GGUF file), full (full fine-tuning). Each run is in a subdirectory of --out. A number for
    --lr applies to all of them. Empty trains one adapter with --method and --quantize."""

    paper: Literal["commonsense"] | None = None
    """The setting of a paper, with --model and --data: commonsense (DoRA, table 8, of LLaMA 7B on commonsense
    reasoning). Flags that are set win. See docs/guides/data.md."""

    train_on: TrainOn = "answers"
    """The text that the loss covers: all answers of the assistant (or completions), the last answer, or everything."""

    pack: bool = True
    """Whether to pack several examples into a sequence. They do not attend to each other."""

    patience: int | None = None
    """Early stopping: end training after this many evaluations in a row without a better validation loss."""

    eval_share: float = 0.1
    """Maximum time of all evaluations, as a fraction of the time of training (estimated from the numbers of tokens). It
    limits the number of validation examples. 0 does not evaluate."""

    eval_first: bool = True
    """Whether to evaluate before training."""

    label_smoothing: float = 0.0
    """Label smoothing in training: the probability that is spread evenly over the vocabulary."""

    neftune: float = 0.0
    """Scale of NEFTune's noise on the token embeddings in training. 5 is a usual value; 0 adds no noise."""

    test_examples: int | None = 40
    """Number of test examples (else validation examples) that base and adapter answer after training, for the table of
    perplexity, ROUGE-L and BLEU. None uses all, 0 none."""

    def __post_init__(self) -> None:
        DecoderConfig.__post_init__(self)
        Decoding.__post_init__(self)
        settings.positive(self, "patience")
        settings.not_negative(self, "neftune", "test_examples")
        settings.fraction(self, "label_smoothing", "eval_share")
        if self.paper and len(self.changed("model", "data")) < 2:
            raise ValueError(
                f"--paper {self.paper}: pass a model and data as in the original setting, for example --model "
                "huggyllama/llama-7b --data commonsense:DIRECTORY"
            )
        if self.methods:
            self._check_methods()
        needed = [name for name in ("patience", "eval_every") if getattr(self, name) is not None]
        if needed and not self.evaluates:
            raise ValueError(f"{' and '.join(needed)}: eval_share or validation_examples is 0, so nothing is evaluated")

    def preset(self) -> Self:
        """Returns the settings of the paper for the model and the data, in place of the defaults."""
        return presets.preset(self, str(self.paper), _COMMONSENSE, {**self.FAST, **_FAST_PAPER})

    def _check_methods(self) -> None:
        """Raises a ValueError if a setting is set that `methods` determines, or that none of them has."""
        if self.init_from is not None:
            raise ValueError("methods: every run starts from a new adapter; drop --init-from, or --methods")
        if changed := self.changed("method", "quantize"):
            kinds = {METHODS[name][0] for name in self.methods} if self.method == "lora" else {self.method}
            near = [name for name, (kind, quantize) in METHODS.items() if kind in kinds and quantize == self.quantize]
            flags = " ".join(f"--{name} {getattr(self, name)}" for name in changed)
            hint = f"use --methods {','.join(near)}" if near else f"run {flags} without --methods"
            raise ValueError(f"methods determines method and quantize; instead of {flags}, {hint}")
        if {*self.methods} == {"full"}:
            self.check_full()

    @property
    def evaluates(self) -> bool:
        """Whether to evaluate if there is validation data."""
        return self.eval_share > 0 and self.validation_examples != 0

    def encoding(self) -> Options:
        """The options for converting records to tokens."""
        return dataclasses.replace(super().encoding(), train_on=self.train_on)


DEFAULTS = Config()
