"""Hyperparameters of supervised fine-tuning that studies take besides their own settings."""

from dataclasses import dataclass
from typing import Any

from experiments import settings
from experiments.configs.decoder import BatchSizes, Float
from experiments.training.options import Schedule


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A base class of configs. The defaults are those of sft."""

    epochs: int | None = None
    """Passes over the training examples. None is as many as --steps needs, or one."""

    steps: int | None = None
    """Maximum number of training steps. None trains for all epochs."""

    batch_size: int | None = None
    """Sequences per training step. None is one for each microbatch."""

    accumulate: int = 1
    """Microbatches per step, computed one after another. Activations take the memory of one microbatch."""

    pack: bool = True
    """Whether to pack several examples into a sequence."""

    dtype: Float = "float32"
    """The dtype of activations and of the base's weights that are not quantized."""

    alpha: float = 32.0
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Dropout rate of the adapters' inputs."""

    schedule: Schedule = "linear"
    """The learning rate after warmup; see sft."""

    warmup: float = 0.03
    """Fraction of the steps in which the learning rate rises from 0; from 1 on, the number of these steps."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    label_smoothing: float = 0.0
    """Label smoothing in training: the probability that is spread evenly over the vocabulary."""

    clip: float | None = 1.0
    """Maximum global norm of the gradients. None does not clip."""

    def check_fine_tuning(self) -> None:
        """Raises a ValueError that names a setting which is out of range."""
        settings.positive(self, "epochs", "steps", "batch_size", "accumulate", "alpha", "clip")
        settings.not_negative(self, "warmup", "weight_decay")
        settings.fraction(self, "dropout", "label_smoothing")

    def fine_tuning(self, *, full: bool = False) -> dict[str, Any]:
        """Returns the fields of sft's config that these settings determine.

        Args:
          full: Whether for full fine-tuning, which has no scale and no dropout.
        """
        of_adapter = {} if full else {"alpha": self.alpha, "dropout": self.dropout}
        return of_adapter | {
            "epochs": self.epochs or self.steps or 1,  # at least one step each
            "steps": self.steps,
            "batch": BatchSizes(self.batch_size, self.accumulate),
            "pack": self.pack,
            "dtype": self.dtype,
            "schedule": self.schedule,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "label_smoothing": self.label_smoothing,
            "clip": self.clip,
        }

    def extent(self) -> str:
        """Returns the steps of a run and their sequences as text."""
        size = self.batch_size or self.accumulate
        steps = f"{self.epochs or 1} epochs" if self.steps is None else f"at most {self.steps:,} steps"
        return f"{steps}, {'one sequence' if size == 1 else f'{size} sequences'} a step"
