"""The settings that all studies of a decoder share."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from experiments import settings
from experiments.input.checking import OnBad
from experiments.input.forms import FormName
from experiments.input.options import Options, parse_arguments
from experiments.models.options import AttentionKernel, Remat
from experiments.training.options import Schedule
from experiments.training.runtime import Runtime

Target = Literal["attention", "feed-forward", "query", "key", "value", "gate", "up", "down", "embedding", "head"]
Float = Literal["float32", "bfloat16"]
Quantization = Literal["none", "nf4", "fp4", "int8", "int4", "stored"]


@dataclass(frozen=True)
class BatchSizes:
    """Sequences per training step."""

    global_: Annotated[int | None, tyro.conf.arg(name="global")] = None
    """Sequences per step, over all devices and processes. None is the smallest number: one for each part of the batch
    on the mesh (mesh.data × mesh.fsdp) and each microbatch. With large batches, LoRA loses more to full fine-tuning
    than with small ones (LoRA Without Regret)."""

    accumulate: int = 1
    """Microbatches per step, computed one after another. Activations take the memory of one microbatch."""

    def __post_init__(self) -> None:
        if self.global_ is not None and self.global_ < 1:
            raise ValueError(f"batch.global must be positive, not {self.global_}")
        if self.accumulate < 1:
            raise ValueError(f"batch.accumulate must be positive, not {self.accumulate}")


@dataclass(frozen=True)
class DecoderConfig(Runtime):
    """Trains an adapter of a decoder."""

    FAST: ClassVar[Mapping[str, Any]] = {"steps": 2, "samples": 2, "validation_examples": 2}
    """What `fast` sets, unless it is set otherwise."""

    SWEPT: ClassVar[Mapping[str, float]] = {}
    """The best learning rates of short runs, by model."""

    model: str = "smollm2-135m"
    """The base: a directory in Hugging Face layout with tokenizer.json, a GGUF file, a name on the Hugging Face Hub
    (ORG/NAME or ORG/NAME/FILE.gguf), or a model that is installed (smollm2-135m) or shipped (tiny-llama, tiny-gpt2)."""

    data: tuple[str, ...] = ("debian_synopses",)
    """The training data: files, globs, directories with train and validation files, data sets on the Hugging Face Hub
    (ORG/NAME:SPLIT), or debian_synopses or debian_sections, which are shipped. Several are concatenated. Each may end
    in :WEIGHT, how often its examples are seen per epoch, as in a.jsonl:3 b.parquet:0.5."""

    data_form: FormName | None = None
    """The format of the records. None detects it from their columns: messages (chat), conversations (sharegpt),
    instruction and output (alpaca), prompt and completion, text."""

    on_bad: OnBad = "error"
    """What to do about a malformed record: stop before training with its file and line (error), or count it and leave
    it out (skip)."""

    validation: tuple[str, ...] = ()
    """The validation data, named in the same ways as --data. Empty uses the validation files next to the training
    files, if there are any."""

    validation_share: float = 0.0
    """Fraction of the training examples to hold out for validation, if the data has no validation examples."""

    out: Path = Path("runs/decoder")
    """The output directory. If it holds a finished run with the same settings, its results are shown, and training
    continues only if --epochs, --steps, --max-minutes or --patience allow more. An interrupted run resumes."""

    fresh: bool = False
    """Start over, even if --out holds a finished or interrupted run."""

    init_from: Path | None = None
    """The adapter to start from: a directory that lora_jax or PEFT wrote. It determines method, targets, ranks, alpha
    and dropout."""

    method: Literal["lora", "dora", "full"] = "lora"
    """The adapter method. full trains all weights instead (full fine-tuning), at a rate without the factor of ten for
    LoRA; the memory of a step then also holds a trained copy, gradients and optimizer state of every weight, and there
    is no PEFT export: merge writes the model."""

    targets: tuple[Target, ...] = ("attention", "feed-forward")
    """The weights to adapt: attention projections, feed-forward layers (including the experts of a mixture), one of
    these alone (query, key, value; gate, up, down), the token embedding, the output head. The LoRA paper adapts query
    and value. The default is all linear layers of the blocks: feed-forward layers matter most, and attention alone is
    worse at equal parameters (LoRA Without Regret)."""

    rank: int = 16
    """Rank of the LoRA factors."""

    ranks: tuple[str, ...] = ()
    """Ranks that differ from --rank, as in attention=8 feed_forward/down=32: PATTERN=RANK, where the pattern is a
    regular expression that is searched for in a weight's path. The first match applies."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank. With 32 the best learning rate hardly depends on the rank (LoRA Without
    Regret)."""

    adapter_dtype: Float = "float32"
    """The dtype of the factors and of the optimizer state."""

    quantize: Quantization = "none"
    """The quantization of the base's linear layers. nf4 is QLoRA's format. stored uses the codes of a GGUF file as they
    are, those of the embedding included."""

    double_quantization: bool = True
    """Whether the scales of quantized weights are quantized too, to eight bits."""

    dtype: Float = "float32"
    """The dtype of activations and of the base's weights that are not quantized."""

    template: str | None = None
    """A chat template to use instead of the checkpoint's default: a file, Jinja source, or the name of one of the
    checkpoint's templates."""

    template_arguments: tuple[str, ...] = ()
    """Variables for the chat template: a JSON object or NAME=VALUE, as in enable_thinking=false."""

    control_tokens: Literal["text", "parse"] = "text"
    """How to read text in a record that spells a control token: as plain text, or as that token (parse)."""

    tokenize_together: bool = False
    """Tokenize prompt and answer as one text. A token may then span their boundary, which does not happen when the
    model is prompted."""

    length: int | None = None
    """Tokens per sequence. Longer examples are truncated. None chooses the smallest multiple of 128 that truncates no
    example, at most 2,048 and what the model supports."""

    batch: BatchSizes = field(default_factory=BatchSizes)
    """Sequences per training step."""

    epochs: int = 1
    """Passes over the training examples."""

    steps: int | None = None
    """Maximum number of training steps. None trains for all epochs."""

    max_minutes: float | None = None
    """Maximum training time in minutes, including evaluation and compilation. The adapter is written at the end."""

    train_examples: int | None = None
    """Number of training examples, from the beginning. None uses all."""

    validation_examples: int | None = 256
    """Maximum number of validation examples. None uses all; 0 does not evaluate."""

    eval_every: int | None = None
    """Steps between evaluations. None evaluates after each epoch and, if there is only one, also halfway through it.
    The last step is always evaluated; with the number of all steps, only that one."""

    log_every: int = 1
    """Steps between entries of metrics.jsonl and TensorBoard. An entry has the mean loss since the previous one."""

    lr: float | Literal["auto"] | None = None
    """Peak learning rate. auto applies a published rule: ten times the rate of full fine-tuning, by hidden size (LoRA
    Without Regret, and the cookbook beside it). None is the best rate of short runs for smollm2-135m, and auto for
    other models and for full fine-tuning. The rate is printed."""

    schedule: Schedule = "linear"
    """The learning rate after warmup: it decays to the floor linearly or along a cosine, stays constant, or (wsd) stays
    constant and then decays linearly."""

    warmup: float = 0.03
    """Fraction of the steps in which the learning rate rises from 0; from 1 on, the number of these steps."""

    lr_floor: float = 0.0
    """The final learning rate, as a fraction of the peak."""

    decay: float = 0.1
    """Fraction of the steps in which the wsd schedule decays."""

    weight_decay: float = 0.0
    """AdamW's weight decay of the LoRA factors, and of all matrices in full fine-tuning. DoRA's magnitudes do not
    decay."""

    clip: float | None = 1.0
    """Maximum global norm of the gradients. None does not clip."""

    dropout: float = 0.0
    """Dropout rate of the adapters' inputs."""

    remat: Remat | Literal["auto"] = "auto"
    """Rematerialization: what the backward pass recomputes instead of storing. auto recomputes as little as half of the
    memory that the base leaves allows, according to an estimate of the activations."""

    attention: AttentionKernel | Literal["auto"] = "auto"
    """The attention kernel. auto is flash on TPUs if the length is a multiple of 128, otherwise xla."""

    loss_chunk: int = 512
    """Tokens per sequence whose logits are computed at a time. Smaller chunks take less memory."""

    optimizer_on_host: bool = False
    """Keep the optimizer state in host memory."""

    samples: int = 3
    """Number of validation prompts that the model answers before and after training."""

    new_tokens: int = 40
    """Maximum number of tokens per answer."""

    fast: bool = False
    """The smallest complete run: two steps, two examples of each kind."""

    seed: int = 0
    """Random seed of the initial factors, dropout and the order of the examples."""

    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "validation"):  # a single name may be a string
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if not self.data:
            raise ValueError("data is empty; expected at least one file, directory or data set")
        settings.positive(self, "rank", "alpha", "length", "epochs", "clip", "loss_chunk", "checkpoint_every")
        settings.positive(self, "steps", "train_examples", "new_tokens")
        settings.use_fast(self, self.FAST)
        settings.positive(self, "max_minutes", "eval_every", "log_every")
        settings.not_negative(self, "lr", "weight_decay", "samples", "seed", "validation_examples", "warmup")
        settings.fraction(self, "dropout", "validation_share")
        if self.length is not None and self.length >= 2**31:
            raise ValueError(f"length must be below 2**31, not {self.length}")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor must be a fraction of the peak, from 0 to 1, not {self.lr_floor}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be a fraction of the steps, above 0 and at most 1, not {self.decay}")
        if not self.targets:
            raise ValueError("targets is empty; expected at least one kind of weight to adapt")
        if self.validation and self.validation_share:
            raise ValueError("validation and validation_share exclude each other; set only one of them")
        self.rank_patterns()
        parse_arguments(self.template_arguments)
        changed = self.changed(*OF_ADAPTER)
        if self.init_from is not None and changed:
            raise ValueError(
                f"--init-from: the adapter determines {', '.join(changed)}; set either --init-from or these"
            )
        if self.method == "full":
            self.check_full()
        if self.method == "full" and self.quantize != "none":
            raise ValueError(
                f"method full trains the weights, of which quantize {self.quantize} stores codes; use quantize none"
            )

    def check_full(self) -> None:
        """Raises a ValueError if a setting of adapters is set, of which full fine-tuning has none."""
        if changed := self.changed(*OF_ADAPTER[1:]):
            flags = " and ".join(f"--{name}" for name in changed)
            raise ValueError(f"method full trains all weights and has no {', '.join(changed)}; drop {flags}")

    def changed(self, *names: str) -> list[str]:
        """Returns those of some settings that differ from their default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != defaults[name]]

    @property
    def row_length(self) -> int:
        """Tokens per sequence; 128 as long as the data has not chosen the length."""
        return self.length or 128

    @property
    def batch_size(self) -> int:
        """Sequences (or records) per training step."""
        return self.batch.global_ or self.mesh.replicas * self.batch.accumulate

    @property
    def rows_per_example(self) -> int:
        """Sequences per example of a batch."""
        return 1

    def encoding(self) -> Options:
        """The options for converting records to tokens."""
        return Options(
            self.template,
            parse_arguments(self.template_arguments),
            control_tokens=self.control_tokens,
            tokenize_together=self.tokenize_together,
        )

    def rank_patterns(self) -> dict[str, int]:
        """Returns `ranks` as a dict from patterns to ranks."""
        patterns = {}
        for text in self.ranks:
            pattern, equals, rank = text.rpartition("=")
            if not equals or not pattern or not rank.isdecimal() or int(rank) < 1:
                raise ValueError(f"ranks: expected PATTERN=RANK, as in attention=8, got {text!r}")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"ranks: {pattern!r} is not a valid regular expression ({error})") from None
            patterns[pattern] = int(rank)
        return patterns


OF_ADAPTER = ("method", "targets", "rank", "ranks", "alpha", "dropout")
"""Settings that the adapter of `init_from` determines."""
