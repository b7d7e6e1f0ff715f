"""Data to text, summaries and SQL with a decoder: the base, LoRA on query and value, LoRA on all linear layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from experiments import settings


@dataclass(frozen=True)
class Config:
    """Generates texts and SQL with SmolLM2-135M, before and after LoRA (LoRA, tables 3 and 4).

    Three tasks: tags of a Debian package to its synopsis (like E2E), long description to synopsis (like SAMSum), and a
    question on a generated table to SQL, which sqlite3 executes (like WikiSQL). Each is answered by the base, without
    and with solved examples in its prompt, and after LoRA on query and value and on all linear layers.
    """

    STUDY = "experiments.studies.data_to_text.study"
    MINUTES = 45
    FAST: ClassVar = {
        "model": "tiny-llama",
        "tasks": ("debian_tags", "sql_questions"),
        "steps": 2,
        "test_examples": 4,
        "new_tokens": 4,
        "length": 128,
        "rank": 2,
        "template": "{% for message in messages[1:] %}{{ message.content }}\n{% endfor %}",
    }

    model: str = "smollm2-135m"
    """The base, a model as for sft."""

    tasks: tuple[str, ...] = ("debian_tags", "debian_synopses", "sql_questions")
    """The tasks, from debian_tags, debian_synopses and sql_questions."""

    rank: int = 16
    """Rank of the LoRA factors."""

    lr: float | None = None
    """Peak learning rate. None is sft's choice for the model."""

    steps: int = 64
    """Training steps of each run, of one sequence each, into which examples are packed."""

    length: int = 256
    """Tokens per sequence."""

    test_examples: int = 60
    """Number of test examples of each task, from the beginning."""

    new_tokens: int = 40
    """Maximum number of tokens per answer."""

    template: str | None = None
    """A chat template for a model without one, as for sft."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/data-to-text")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: a tiny model with random weights, which supports the shorter texts only."""

    def __post_init__(self) -> None:
        settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        settings.positive(self, "rank", "lr", "steps", "length", "test_examples", "new_tokens")
        settings.not_negative(self, "seed")
        tasks = type(self).tasks
        if not self.tasks or not {*self.tasks} <= {*tasks} or len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"tasks must be one or more of {', '.join(tasks)}, each once; got {' '.join(self.tasks)}")


DEFAULTS = Config()
