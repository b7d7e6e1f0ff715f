"""Records a run's settings, and its metrics as JSON lines and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from experiments.errors import reading
from experiments.training.processes import is_first
from lora_jax.io import replace_file

CONFIG, METRICS = "config.json", "metrics.jsonl"


class Record:
    """The record of a run, a context manager that closes its files; only the first process writes.

    Args:
      directory: The directory of the run; created if it does not exist.
      config: The resolved settings.
      step: The step that a run resumes from; records of later steps are removed.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], step: int = 0):
        self._file, self._events = None, None
        if not is_first():
            return
        directory.mkdir(parents=True, exist_ok=True)
        with replace_file(directory / CONFIG) as file:
            file.write_text(json.dumps(dict(config), indent=2, default=str) + "\n", encoding="utf-8")
        path = directory / METRICS
        lines = [line for line in read(path) if line["step"] <= step] if path.exists() else []
        with replace_file(path) as file:
            file.write_text("".join(map(_line, lines)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()

    def write(self, step: int, **values: float | None) -> None:
        """Writes the measurements of a step; values that are None are omitted."""
        if self._file is None or self._events is None:
            return
        metrics = {name: value for name, value in values.items() if value is not None}
        self._file.write(_line({"step": step, **metrics}))
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`, except a last line that a killed process did not finish."""
    with reading(path, "JSON lines with a step each"):
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line | {"step": int(line["step"])} for line in lines]


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values)) + "\n"
