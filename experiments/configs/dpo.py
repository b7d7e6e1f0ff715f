"""A decoder that learns preferences: DPO and related objectives."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments import settings
from experiments.configs.post_training import Paired
from experiments.input.checking import Use
from experiments.input.records import Preference, Rated

LossName = Literal["sigmoid", "hinge", "ipo", "robust", "orpo", "simpo", "kto"]
_BETA: dict[str, float] = {"simpo": 2.0}


@dataclass(frozen=True)
class Config(Paired):
    """Trains a decoder on preferences: of two answers, the better one becomes more likely.

    The default data prefers the true synopsis of a Debian package to that of a sibling, another package of the same
    source, split by source. The study reports how often the model finds the chosen answer of held-out pairs likelier,
    and by how much, before and after training, with standard errors. It writes the adapter (also in PEFT's format), a
    table, a figure and a JSON record to --out. After an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.post_training.dpo"
    CHECK = "experiments.studies.post_training.records"
    MINUTES = 10
    FAST: ClassVar[Mapping[str, Any]] = {**Paired.FAST, "out": Path("runs/dpo-fast")}

    data: tuple[str, ...] = ("debian_siblings",)
    """The training data, named as for sft: records with chosen and rejected, and prompt or a shared beginning; for kto
    with prompt, completion and label. debian_siblings is shipped."""

    out: Path = Path("runs/dpo")
    """The output directory. If it holds a finished run with the same settings, its results are shown. An interrupted
    run resumes."""

    loss: LossName = "sigmoid"
    """The objective: DPO with the loss sigmoid, hinge, ipo or robust; orpo and simpo, which have no reference; kto, for
    answers with a label."""

    beta: float | None = None
    """How strongly the policy is held to the reference (dpo, kto), or the weight of the preference (orpo, simpo). None
    is 2 for simpo, otherwise 0.1, the defaults of TRL."""

    gamma: float = 1.0
    """The margin of simpo."""

    smoothing: float = 0.0
    """The probability that chosen and rejected are exchanged (sigmoid, robust, simpo)."""

    length_normalized: bool = False
    """Compare mean log-probabilities of tokens instead of sums (sigmoid, hinge, robust)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "beta")
        settings.not_negative(self, "gamma")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing must be at least 0 and below 0.5, not {self.smoothing}")

    @property
    def strength(self) -> float:
        """The value of `beta`."""
        return _BETA.get(self.loss, 0.1) if self.beta is None else self.beta

    @property
    def use(self) -> Use:
        return Use("dpo --loss kto", (Rated,)) if self.loss == "kto" else Use("dpo", (Preference,))


DEFAULTS = Config()
