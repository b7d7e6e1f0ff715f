"""The `config.json` of models that are too large to ship, to compile their steps without their weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}
_CHATS = {
    "Llama-2-7b-chat-hf": "Llama-2-7b-hf",
    "Llama-2-70b-chat-hf": "Llama-2-70b-hf",
    "Meta-Llama-3-8B-Instruct": "Meta-Llama-3-8B",
    "Mixtral-8x7B-Instruct-v0.1": "Mixtral-8x7B-v0.1",
}
"""Fine-tuned models, and the base with the same shape."""

NAMES = tuple(sorted((*_FILES, *_CHATS)))
"""The models whose shapes are shipped, by their names on the hub without the organization."""


def has(model: str) -> bool:
    """Whether a model's shape is shipped, by its name on the hub with or without the organization.

    A directory of that name takes precedence.
    """
    return _name(model) in NAMES and not Path(model).is_dir()


def read(model: str) -> Mapping[str, Any]:
    """Returns the content of the model's `config.json`, or of its base's if it is fine-tuned."""
    name = _name(model)
    return json.loads(_FILES[_CHATS.get(name, name)].read_text(encoding="utf-8"))


def _name(model: str) -> str:
    return model.rpartition("/")[2]
