"""The settings that the studies of post-training share."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from experiments.configs.decoder import BatchSizes, DecoderConfig
from experiments.input.checking import Use


@dataclass(frozen=True)
class PostTraining(DecoderConfig, abc.ABC):
    """Trains an adapter of a decoder by an objective, and compares it with the base on held-out records."""

    FAST: ClassVar[Mapping[str, Any]] = {"steps": 2, "validation_examples": 4, "samples": 2}

    lr: float | Literal["auto"] | None = 1e-3
    """Peak learning rate. auto applies a published rule for supervised fine-tuning: ten times the rate of full
    fine-tuning, by hidden size (LoRA Without Regret, and the cookbook beside it). With --method full the default is
    auto, without the factor of ten."""

    length: int | None = None
    """Tokens of a prompt with its answer. Longer records are left out. None is the smallest multiple of 16 that keeps
    everything, at most 2,048 and what the model supports."""

    validation: tuple[str, ...] = ()
    """The held-out records, named in the same ways as --data. Empty uses the validation files next to the training
    files."""

    validation_examples: int | None = 120
    """Maximum number of held-out records, on which base and adapter are compared. None uses all."""

    eval_every: int | None = None
    """Steps between evaluations on the held-out records. None evaluates only the base and the trained adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "full" and self.lr == type(self).lr:
            object.__setattr__(self, "lr", "auto")
        if self.validation_examples == 0:
            raise ValueError("validation_examples is 0; expected at least one record to compare base and adapter on")

    @property
    @abc.abstractmethod
    def use(self) -> Use:
        """The records that the study trains on."""


@dataclass(frozen=True)
class Paired(PostTraining):
    """Trains on pairs of a better and a worse answer."""

    batch: BatchSizes = field(default_factory=lambda: BatchSizes(4))
    """Records per training step."""

    steps: int | None = 60
    """Maximum number of training steps. None trains for all epochs."""

    @property
    def rows_per_example(self) -> int:
        return 2
