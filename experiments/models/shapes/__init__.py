"""The `config.json` of models that are too large to ship, for compiling their steps where their weights are not."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}


def has(model: str) -> bool:
    """Whether a model's shape is shipped, by its name on the hub with or without the organisation."""
    return model.rpartition("/")[2] in _FILES


def read(model: str) -> Mapping[str, Any]:
    """The content of its `config.json`."""
    return json.loads(_FILES[model.rpartition("/")[2]].read_text(encoding="utf-8"))
