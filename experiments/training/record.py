"""What a run writes about itself while it runs: its settings, and metrics as JSON lines and TensorBoard events."""

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
    """The record of a run in its directory; the first process writes it, the calls of others do nothing.

    A context manager: leaving it closes the files.

    Args:
      directory: Of the run; made where it does not exist.
      config: The resolved settings.
      step: Steps that a resumed run has done: what an earlier process wrote of later ones is taken out.
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
        """A line of what was measured at a step; what is None is left out."""
        if self._file is None or self._events is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        self._file.write(_line({"step": step, **known}))
        for name, value in known.items():
            self._events.add_scalar(name, value, step)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, but for one at the end that a killed process did not finish."""
    with reading(path, "JSON lines with a step each"):
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line | {"step": int(line["step"])} for line in lines]


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values)) + "\n"
