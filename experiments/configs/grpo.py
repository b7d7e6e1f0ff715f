"""A decoder that learns from rewards of its own answers: GRPO."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from experiments import settings
from experiments.configs.decoder import BatchSizes
from experiments.configs.post_training import PostTraining
from experiments.evaluation.rewards import RewardName
from experiments.input.checking import Use
from experiments.input.records import Problem


@dataclass(frozen=True)
class Config(PostTraining):
    """Trains a decoder on problems with a checkable answer: it samples several answers, and the better ones become
    likelier.

    The default problems ask for the topic of a Debian package in one word, which the base solves sometimes. The study
    reports the mean reward over steps and on held-out problems before and after training, with standard errors, and
    prints samples. It writes the adapter (also in PEFT's format), a table, a figure and a JSON record to --out. After
    an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.post_training.grpo"
    CHECK = "experiments.studies.post_training.records"
    MINUTES = 12
    FAST: ClassVar[Mapping[str, Any]] = {**PostTraining.FAST, "group": 2, "out": Path("runs/grpo-fast")}

    data: tuple[str, ...] = ("debian_topics",)
    """The training data, named as for sft: records with prompt and answer. debian_topics is shipped."""

    out: Path = Path("runs/grpo")
    """The output directory. If it holds a finished run with the same settings, its results are shown. An interrupted
    run resumes."""

    reward: RewardName = "choice"
    """What earns a reward of 1: the answer contains the reference and none of the right answers of other problems
    (choice), equals the reference (exact), contains it (contains), or its last number is the reference (number)."""

    group: int = 8
    """Answers to each prompt, whose rewards are compared."""

    new_tokens: int = 6
    """Maximum number of tokens per answer."""

    temperature: float = 0.7
    """Temperature of sampling, in training and on held-out problems."""

    form: Literal["grpo", "dapo", "dr-grpo"] = "grpo"
    """grpo: advantages divided by the group's deviation, the mean over answers. dapo: the mean over tokens and a higher
    upper clip. dr-grpo: neither the deviation nor the lengths of answers divide."""

    beta: float = 0.0
    """The weight of the divergence from the reference: the base, or the adapter of --init-from."""

    batch: BatchSizes = field(default_factory=lambda: BatchSizes(4))
    """Prompts per training step."""

    lr: float | Literal["auto"] | None = 2e-4
    """Peak learning rate. At 1e-3, the base of the defaults gives the same answer to all prompts after few steps, whose
    advantages are zero. auto: see dpo."""

    epochs: int = 10
    """Passes over the training examples."""

    steps: int | None = 40
    """Maximum number of training steps. None trains for all epochs."""

    validation_examples: int | None = 100
    """Maximum number of held-out records, on which base and adapter are compared. None uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "temperature")
        settings.not_negative(self, "beta")
        if self.group < 2:
            raise ValueError(f"group must be at least 2, to compare answers with each other, not {self.group}")

    @property
    def rows_per_example(self) -> int:
        return self.group

    @property
    def use(self) -> Use:
        return Use("grpo", (Problem,))


DEFAULTS = Config()
