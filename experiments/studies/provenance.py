"""What decides a run's numbers, and the directory that it therefore has."""

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.tasks.examples import Examples
from experiments.training import outputs, processes
from lora_jax import peft

_WRITTEN = (
    *("adapter", "step-[0-9]*", "merged", "peft", "test_logits.npy"),
    *("checkpoints", "config.json", "history.json", "metrics.jsonl", "profile", "result.json", "tensorboard"),
)
"""What studies write into the directory of a run."""


def directory(out: Path, name: str, everything: Any, *, fresh: bool) -> Path:
    """Where a run lives: other settings, data, model or versions, another directory; nothing stale is resumed.

    Args:
      out: Where all runs live.
      name: What the directory's name begins with.
      everything: All that decides the run's numbers, as JSON can hold it.
      fresh: Remove what is there.
    """
    mark = hashlib.sha256(json.dumps([everything, versions()], sort_keys=True).encode()).hexdigest()[:8]
    place = out / f"{name}-{mark}"
    with processes.first_before_others():
        if processes.is_first():
            outputs.begin(place, *_WRITTEN, fresh=fresh)
    return place


def digest(model: Path, read: Mapping[str, Examples]) -> str:
    """Of a checkpoint's files and of examples: other ones, another digest."""
    seen = hashlib.sha256()
    for path in [model / "config.json", model / "tokenizer.json", *peft.model_files(model)]:
        with path.open("rb") as file:
            seen.update(hashlib.file_digest(file, "sha256").digest())
    for found in read.values():
        seen.update(repr((found.names, found.texts)).encode() + found.labels.tobytes())
    return seen.hexdigest()


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    try:
        return {"lora-jax": metadata.version("lora-jax"), **found}
    except metadata.PackageNotFoundError:  # run from a checkout
        return found
