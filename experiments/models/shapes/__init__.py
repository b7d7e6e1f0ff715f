"""The `config.json` of models that are too large to ship, for compiling their steps where their weights are not."""

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
"""Fine-tuned models, and the base whose shape they have."""

NAMES = tuple(sorted((*_FILES, *_CHATS)))
"""The models whose shapes are shipped, as on the hub without the organization."""


def has(model: str) -> bool:
    """Whether a model's shape is shipped, by its name on the hub with or without the organization.

    A directory, whatever its name, has a shape of its own.
    """
    return _name(model) in NAMES and not Path(model).is_dir()


def read(model: str) -> Mapping[str, Any]:
    """The content of its `config.json`; of a fine-tuned model that of its base."""
    name = _name(model)
    return json.loads(_FILES[_CHATS.get(name, name)].read_text(encoding="utf-8"))


def _name(model: str) -> str:
    return model.rpartition("/")[2]
