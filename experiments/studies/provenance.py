"""Directories and records of runs, with everything that determines their results."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.pretrained.files import open_files
from experiments.tasks.examples import Examples
from experiments.training import outputs, processes

_WRITTEN = (
    *("adapter", "step-[0-9]*", "merged", "merged.json", "peft"),
    *("test_logits.npy", "test_correct.npy", "test_predictions.npy"),
    *("checkpoints", "config.json", "history.json", "metrics.jsonl", "profile", "result.json", "tensorboard"),
)
"""Names that studies write in the directory of a run."""


def directory(out: Path, name: str, inputs: Any, *, fresh: bool) -> Path:
    """Returns the directory of a run. Its name depends on settings, data, model and versions, so that resuming is safe.

    Args:
      out: The parent of the directories of all runs.
      name: The prefix of the directory's name.
      inputs: Everything that determines the results of the run, as JSON data.
      fresh: Whether to remove an existing run.
    """
    mark = hashlib.sha256(json.dumps([inputs, versions()], sort_keys=True).encode()).hexdigest()[:8]
    path = out / f"{name}-{mark}"
    with processes.first_before_others():
        if processes.is_first():
            outputs.begin(path, *_WRITTEN, fresh=fresh)
    return path


def digest(model: Path, splits: Mapping[str, Examples]) -> str:
    """Returns a digest of a checkpoint's files and of examples."""
    result = hashlib.sha256()
    files = open_files(model)
    for name in ("config.json", "tokenizer.json"):
        result.update(hashlib.sha256((files.read(name) or "").encode()).digest())
    for path in files.weights:
        with path.open("rb") as file:
            result.update(hashlib.file_digest(file, "sha256").digest())
    for split in splits.values():
        result.update(repr((split.names, split.texts)).encode() + split.labels.tobytes())
    return result.hexdigest()


def record(config: Any, **entries: Any) -> dict[str, Any]:
    """Returns the JSON record of a study: its config, versions and devices, and other entries."""
    devices = [device.device_kind for device in jax.devices()]
    return {"config": asdict(config), "versions": versions(), "devices": devices, **entries}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect the results."""
    packages = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    try:
        return {"lora-jax": metadata.version("lora-jax"), **packages}
    except metadata.PackageNotFoundError:  # run from a checkout
        return packages
