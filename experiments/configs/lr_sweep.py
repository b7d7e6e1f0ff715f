"""LoRA's learning rates by rank, next to full fine-tuning's."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings

FAST = {
    "ranks": (1, 4),
    "attention": False,
    "lora_rates": (1e-3, 3e-3, 1e-2),
    "full_rates": (1e-4, 3e-4, 1e-3),
    "head_examples": 100,
    "train_examples": 64,
    "validation_examples": 64,
    "lengths": (40,),
    "decoder": "tiny-llama",
    "decoder_data": ("debian_sections",),
    "decoder_rates": (1e-3, 3e-3),
    "decoder_steps": 2,
    "decoder_examples": 4,
    "out": Path("runs/lr-sweep-fast"),
}
"""What `fast` sets, unless it is set otherwise."""


@dataclass(frozen=True)
class Config:
    """Measures the validation loss by learning rate, for LoRA of several ranks and for full fine-tuning.

    Checks the findings of LoRA Without Regret, which are the defaults of this project: on all linear layers, with
    alpha 32, LoRA's best learning rate is about ten times that of full fine-tuning and hardly depends on the rank; LoRA
    is then as good as full fine-tuning, and LoRA on attention alone is worse with as many parameters. Every finding is
    reported as observed, not observed or not decided, with its figures.

    The encoder all-MiniLM-L6-v2 is trained on the quickstart's task, from a head that is converged on other examples,
    so that every example is new when it is trained on. All learning rates of a curve are trained at once
    (lora_jax.train_many). The decoder, with LoRA only, is trained as by sft, whose defaults apply. It writes a figure
    and a JSON record to --out. After an interruption, the same command resumes; finished curves are not repeated.

    References: Schulman et al., LoRA Without Regret, 2025
    """

    STUDY = "experiments.studies.lr_sweep.study"
    MINUTES = 30

    ranks: tuple[int, ...] = (1, 8, 64)
    """Ranks of LoRA on all linear layers, a curve each."""

    attention: bool = True
    """Also train LoRA on attention alone, with as many parameters as the middle one of the ranks on all linear layers.
    """

    alpha: float = 32.0
    """The update is scaled by alpha / rank. 32 for every rank is the choice of LoRA Without Regret."""

    lora_rates: tuple[float, ...] = (3e-4, 1e-3, 1.8e-3, 3.2e-3, 5.6e-3, 1e-2)
    """Peak learning rates of LoRA."""

    full_rates: tuple[float, ...] = (3e-5, 5.6e-5, 1e-4, 1.8e-4, 3.2e-4, 1e-3)
    """Peak learning rates of full fine-tuning."""

    model: str = "all-MiniLM-L6-v2"
    """The encoder: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2,
    which a Python package provides."""

    data: str = "debian_sections"
    """The encoder's data: debian_sections, which is shipped, or a directory in the quickstart's format."""

    head_examples: int = 500
    """Number of training examples that the head is fitted to, from the beginning."""

    train_examples: int = 2000
    """Number of training examples after those of the head."""

    validation_examples: int | None = 1000
    """Number of validation examples, whose loss is measured once, at the end. They also select the head's penalty. None
    uses all."""

    batch_size: int = 16
    """Examples per training step."""

    epochs: int = 1
    """Passes over the training examples. With more, examples are no longer new."""

    lengths: tuple[int, ...] = (14, 40)
    """The lengths, in tokens, that texts are padded to. Longer texts are truncated. Each length is compiled once."""

    decoder: str | None = "smollm2-135m"
    """The decoder, a model as for sft. None omits its curve."""

    decoder_data: tuple[str, ...] = ("debian_synopses:0.04",)
    """The decoder's data, named as for sft."""

    decoder_rates: tuple[float, ...] = (3e-4, 1e-3, 1.8e-3, 3.2e-3, 5.6e-3)
    """Peak learning rates of LoRA on the decoder, a run each."""

    decoder_steps: int = 48
    """Training steps of the decoder."""

    decoder_examples: int = 60
    """Number of validation examples of the decoder."""

    warmup: float = 0.06
    """Fraction of the encoder's steps in which the learning rate rises from 0. It decays linearly to 0 afterwards."""

    label_smoothing: float = 0.0
    """Label smoothing in training. The measured loss has none."""

    clip: float = 1.0
    """Maximum global norm of each run's gradients."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/lr-sweep")
    """The output directory. Curves that it already holds are resumed or shown, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted curves with the same settings."""

    fast: bool = False
    """The smallest complete run: few examples and rates, and a tiny decoder with random weights."""

    checkpoint_every: int = 25
    """Training steps between checkpoints."""

    def __post_init__(self) -> None:
        settings.use_fast(self, FAST)
        settings.positive(self, "ranks", "alpha", "lora_rates", "full_rates", "decoder_rates")
        settings.positive(
            self, "head_examples", "train_examples", "validation_examples", "decoder_steps", "decoder_examples"
        )
        settings.positive(self, "batch_size", "epochs", "clip", "checkpoint_every")
        settings.not_negative(self, "seed")
        settings.fraction(self, "warmup", "label_smoothing")
        settings.lengths(self)
        for name in ("lora_rates", "full_rates", "decoder_rates"):
            if list(rates := getattr(self, name)) != sorted(rates):
                raise ValueError(f"{name} must be ascending, not {' '.join(map(str, rates))}")

    @property
    def middle_rank(self) -> int:
        """The middle one of the ranks."""
        return sorted(self.ranks)[len(self.ranks) // 2]

    @property
    def attention_rank(self) -> int:
        """The rank on attention with about as many parameters as the middle rank on all linear layers of BERT: per rank
        and layer, factors have the size of 8 widths in attention and of 10 in the feed-forward layer."""
        return round(self.middle_rank * 18 / 8)


DEFAULTS = Config()
