"""Which layers QLoRA has to adapt (QLoRA paper, figure 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from experiments import settings
from experiments.configs import presets
from experiments.configs.comparison import Comparison
from experiments.configs.qlora_scripts import RANK, SCRIPTS

_PAPER: dict[str, Any] = {
    "ranks": (8, RANK),
    "full_lr": 2e-5,  # that of Alpaca's authors
    "seeds": 1,
    "train_examples": None,
    "test_examples": 200,
    "label_smoothing": 0.0,
    "new_tokens": 256,
}
_FAST_PAPER: dict[str, Any] = {
    "train_examples": 16,
    "ranks": (2,),
    "steps": 2,
    "length": 64,
    "batch_size": 2,
    "test_examples": 2,
    "new_tokens": 4,
}
_OF_DECODERS = ("steps", "dropout", "length", "new_tokens", "template")
_OF_ENCODERS = ("validation_examples", "lengths")


@dataclass(frozen=True)
class Config(Comparison):
    """Adapts more and more layers of an NF4 base, with several ranks, beside full fine-tuning (QLoRA, figure 2).

    The paper trains LLaMA 7B on Alpaca: LoRA on all linear layers is needed to match full fine-tuning, and the rank
    does not matter then. Here all-MiniLM-L6-v2, whose linear layers are stored as NF4 with double quantization,
    classifies Debian packages.

    With --paper llama-7b, the decoder that --model names is trained on the conversations that --data names
    (alpaca:DIRECTORY or oasst1:DIRECTORY) with the hyperparameters of the authors' scripts for 7B parameters, and
    scored by the ROUGE-L of its answers to held-out examples. Flags that are set win. See docs/guides/data.md.
    """

    STUDY = "experiments.studies.all_linear"
    MINUTES = 20
    FAST: ClassVar = {"ranks": (1, 4)}

    out: Path = Path("runs/all-linear")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    ranks: tuple[int, ...] = (2, 8, 32)
    """The ranks."""

    lr: float = 3e-3
    """Peak learning rate of LoRA, for the alpha of 32."""

    full_lr: float = 2e-4
    """Peak learning rate of full fine-tuning, without quantization."""

    paper: Literal["llama-7b"] | None = None
    """The task of the paper and the setting of its scripts for 7B parameters, with --model and --data."""

    steps: int | None = None
    """With --paper, the maximum number of training steps of each run."""

    dropout: float = 0.0
    """With --paper, the dropout rate of the adapters' inputs."""

    length: int | None = None
    """With --paper, the tokens per sequence. Longer examples are truncated."""

    new_tokens: int | None = None
    """With --paper, the maximum number of tokens per answer."""

    template: str | None = None
    """With --paper, a chat template for a model without one, as for sft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "lr", "full_lr", "steps", "length", "new_tokens")
        settings.fraction(self, "dropout")
        unused = [name for name in (_OF_ENCODERS if self.paper else _OF_DECODERS) if self._is_set(name)]
        if unused:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise ValueError(f"{flags}: only {'without' if self.paper else 'with'} --paper; drop {flags}")
        if self.paper and not (self._is_set("model") and self._is_set("data")):
            raise ValueError(
                f"--paper {self.paper}: pass a decoder and conversations of the original setting, as in --model "
                "huggyllama/llama-7b --data alpaca:DIRECTORY (or oasst1:DIRECTORY)"
            )

    def _use_fast(self) -> None:
        if self.paper is None:  # otherwise preset() has set the values, and others are the user's
            super()._use_fast()

    def _is_set(self, name: str) -> bool:
        """Whether the value of a setting is not its default; `fast` changes no setting that is asked for here."""
        return getattr(self, name) != getattr(type(self), name)

    def preset(self) -> Self:
        """Returns the settings of the paper for the model and the data, in place of the defaults."""
        return presets.preset(self, str(self.paper), SCRIPTS | _PAPER, _FAST_PAPER)


DEFAULTS = Config()
