"""A decoder that does without an instruction what the instruction makes it do."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from experiments import settings
from experiments.configs.decoder import BatchSizes
from experiments.configs.post_training import PostTraining
from experiments.evaluation.rewards import RewardName
from experiments.input.checking import Use
from experiments.input.records import Problem

INSTRUCTION = (
    "Sort the software into a topic: game, mail, math or sound. A puzzle is a game. An IMAP client is mail. A matrix "
    "library is math. A music player is sound. Answer with the topic only."
)


@dataclass(frozen=True)
class Config(PostTraining):
    """Distills a long instruction: the base that reads it is the teacher of the adapter that does not.

    Before each prompt the teacher reads the instruction and some solved problems of the training data.

    The teacher answers each prompt, and the adapter learns the teacher's distributions over the tokens of the answers.
    The study reports the mean reward of answers to held-out problems, and the share of the instruction's gain that
    the adapter has without it, with standard errors. It writes the adapter (also in PEFT's format), a table, a figure
    and a JSON record to --out. After an interruption, the same command resumes.
    """

    STUDY = "experiments.studies.post_training.distill"
    CHECK = "experiments.studies.post_training.records"
    MINUTES = 11
    FAST: ClassVar[Mapping[str, Any]] = {**PostTraining.FAST, "examples": 2, "out": Path("runs/distill-fast")}

    data: tuple[str, ...] = ("debian_topics",)
    """The training data, named as for sft: records with prompt and answer. Only rewards depend on the answer.
    debian_topics is shipped."""

    out: Path = Path("runs/distill")
    """The output directory. If it holds a finished run with the same settings, its results are shown. An interrupted
    run resumes."""

    instruction: str = INSTRUCTION
    """What the teacher reads before each prompt: its system message, or text before a prompt that is text."""

    examples: int = 12
    """Number of training records that the teacher reads with their answers, between instruction and prompt."""

    mix: float = 0.0
    """The divergence: 0 is forward, 1 reverse, between them Jensen and Shannon's."""

    on_policy: bool = False
    """Learn on answers of the adapter instead of the teacher's."""

    reward: RewardName = "choice"
    """What earns a reward of 1: the answer contains the reference and none of the right answers of other problems
    (choice), equals the reference (exact), contains it (contains), or its last number is the reference (number)."""

    new_tokens: int = 6
    """Maximum number of tokens per answer."""

    temperature: float = 0.7
    """Temperature of sampling, in training and on held-out problems."""

    batch: BatchSizes = field(default_factory=lambda: BatchSizes(4))
    """Prompts per training step."""

    steps: int | None = 60
    """Maximum number of training steps. None trains for all epochs."""

    validation_examples: int | None = 100
    """Maximum number of held-out records, on which base and adapter are compared. None uses all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "temperature")
        settings.not_negative(self, "examples")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix must be from 0 (forward) to 1 (reverse), not {self.mix}")
        if not self.instruction.strip():
            raise ValueError("instruction is empty; expected what the teacher is told")

    @property
    def rows_per_example(self) -> int:
        return 2

    @property
    def use(self) -> Use:
        return Use("distill", (Problem,))


DEFAULTS = Config()
