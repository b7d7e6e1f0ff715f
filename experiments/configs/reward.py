"""A reward model: scores by which chosen answers are better than rejected ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments import settings
from experiments.configs.post_training import Paired
from experiments.input.checking import Use
from experiments.input.records import Preference


@dataclass(frozen=True)
class Config(Paired):
    """Trains a decoder to score answers: the chosen answer of a pair gets a higher score than the rejected one.

    The score is a new linear layer on the last token, trained in full next to LoRA on the decoder. The study reports
    how often it ranks held-out pairs correctly, before and after training, with standard errors. It writes the adapter
    (also in PEFT's format), a table, a figure and a JSON record to --out. After an interruption, the same command
    resumes.
    """

    STUDY = "experiments.studies.post_training.reward"
    CHECK = "experiments.studies.post_training.records"
    MINUTES = 6
    FAST: ClassVar[Mapping[str, Any]] = {**Paired.FAST, "out": Path("runs/reward-fast")}

    data: tuple[str, ...] = ("debian_siblings",)
    """The training data, named as for sft: records with chosen and rejected, and prompt or a shared beginning.
    debian_siblings is shipped."""

    out: Path = Path("runs/reward")
    """The output directory. If it holds a finished run with the same settings, its results are shown. An interrupted
    run resumes."""

    center: float = 0.0
    """The weight of the squared sum of both scores, which keeps scores near zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.not_negative(self, "center")

    @property
    def use(self) -> Use:
        return Use("reward", (Preference,))


DEFAULTS = Config()
