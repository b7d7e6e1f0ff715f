"""What is known of a method after a run, and its JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import UserError
from lora_jax.io import reading, replace_file

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One run of one method.

    Attributes:
      method: Its name in the table.
      seed: Of the initial factors and the order of the examples.
      trained_parameters: Scalars that training moves.
      adam_bytes: The optimizer's state; None where no optimizer ran.
      adapter_bytes: What the saved adapter takes on disk.
      seconds: Training and its evaluations, compilation included.
      validation_accuracy: At the end.
      test_accuracy: At the end.
      merged_difference: Largest absolute difference between merged and unmerged test logits.
      merged_agreement: Share of test examples for which both predict the same class.
      losses: Of every training step.
      evaluations: (step, accuracy on validation) pairs.
    """

    method: str
    seed: int
    trained_parameters: int
    adam_bytes: int | None
    adapter_bytes: int
    seconds: float
    validation_accuracy: float
    test_accuracy: float
    merged_difference: float
    merged_agreement: float
    losses: list[float]
    evaluations: list[tuple[int, float]]

    def save(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Reads what `save` wrote."""

        def make(content: Any) -> "Result":
            pairs = [(step, accuracy) for step, accuracy in content.pop("evaluations")]
            return cls(**content, evaluations=pairs)

        return read_json(path, make)


def stored_bytes(directory: Path) -> int:
    """What the files under a directory hold."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def read_json(path: Path, make: Callable[[Any], T]) -> T:
    """What `make` makes of the content of a file that :func:`write_json` wrote.

    Raises:
      UserError: It is damaged, or was written by another version.
    """
    template = "{path}: damaged, or of another version ({reason}); --fresh starts over"
    with reading(path, error=UserError, template=template):
        return make(json.loads(path.read_text(encoding="utf-8")))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
