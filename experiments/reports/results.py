"""The result of a run, and reading and writing of JSON records."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from experiments.errors import UserError
from lora_jax.io import reading, replace_file

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What one run of one method costs and reaches.

    Attributes:
      method: Its name in the table.
      seed: The random seed of the initial factors and the order of the examples.
      trained_parameters: Number of trained scalars.
      adapter_bytes: Size of the saved adapter.
      seconds: Time of training and evaluation, including compilation.
      validation_accuracy: Validation accuracy at the end, or the score of a task with another metric; NaN if training
        diverged.
      test_accuracy: The same on test; NaN if training diverged, or if it is not measured.
      lr: The peak learning rate; None for a fitted head.
    """

    method: str
    seed: int
    trained_parameters: int
    adapter_bytes: int
    seconds: float
    validation_accuracy: float
    test_accuracy: float
    lr: float | None

    def save(self, path: Path) -> None:
        """Writes the outcome as JSON, atomically."""
        write_json(path, without_nan(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads an outcome that :meth:`save` wrote."""

        def make(content: Any) -> Self:
            values = {field.name: content[field.name] for field in fields(cls)}  # earlier versions wrote others too
            accuracies = {name: content[name] for name in ("validation_accuracy", "test_accuracy")}
            return cls(**values | {name: math.nan if x is None else x for name, x in accuracies.items()})

        return read_json(path, make)


def stored_bytes(directory: Path) -> int:
    """Returns the total size of the files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def read_json(path: Path, make: Callable[[Any], T]) -> T:
    """Returns `make(content)` of a file that :func:`write_json` wrote.

    Raises:
      UserError: The file is damaged, or another version wrote it.
    """
    template = "{path}: damaged, or of another version ({reason}); --fresh starts over"
    with reading(path, error=UserError, template=template):
        return make(json.loads(path.read_text(encoding="utf-8")))


def read_record(path: Path, kind: type[T], entries: Mapping[str, Callable[[Any], Any]]) -> T:
    """Reads a dataclass that :func:`write_json` wrote.

    Args:
      path: The file.
      kind: The dataclass.
      entries: Conversions for the entries of fields that are lists, such as lists of tuples.

    Raises:
      UserError: The file is damaged, or another version wrote it.
    """

    def make(content: Any) -> T:
        return kind(**content | {name: list(map(convert, content[name])) for name, convert in entries.items()})

    return read_json(path, make)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as file:
        file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def without_nan(content: Any) -> Any:
    """Replaces NaN and infinite numbers, which JSON does not have, by None.

    Example:
      >>> without_nan({"scores": [0.5, float("nan")]})
      {'scores': [0.5, None]}
    """
    if isinstance(content, Mapping):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
