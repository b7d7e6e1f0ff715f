"""A run's directory, which one run at a time uses, and in which only files of this program are replaced or removed."""

import fnmatch
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import UserError, reading
from experiments.training import lock, processes
from lora_jax.io import create_parents, join_names, replace_file

R = TypeVar("R")
LISTING = ".lora_jax.json"
_FORMAT = "lora_jax outputs"
_INSIDE = "|".join(
    (
        r"\d+|damaged-\d+|.+\.orbax-checkpoint-tmp.*",  # checkpoints
        r"events\.out\.tfevents\..+|plugins",  # tensorboard, profile
        r"adapter\.json|arrays(-[0-9a-f]{32})?|run\.json",
        r"adapter_config\.json|adapter_model\.safetensors|classifier\.safetensors|README\.md",
        r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|tokenizer.*|special_tokens_map\.json|vocab\.txt",
        r"\..*\.(writing|replaced)(\..+)?|\.unfinished-\d+",
    )
)
"""A pattern of the files that this program writes to subdirectories."""


def exclusive(run: Callable[..., R]) -> Callable[..., R]:
    """Decorates a study's `run(config, …)` to hold the lock of `config.out`, in the first process."""

    @functools.wraps(run)
    def locked_run(config: Any, *args: Any, **options: Any) -> R:
        out = config.out
        processes.check_shared(out)
        with ExitStack() as stack:
            with processes.first_before_others():
                if processes.is_first():
                    if os.path.lexists(out) and not out.is_dir():
                        raise UserError(
                            f"out {out}: expected a directory, got {'a link' if out.is_symlink() else 'a file'}"
                        )
                    stack.enter_context(create_parents(out / LISTING))
                    stack.enter_context(lock.hold_lock(out))
            return run(config, *args, **options)

    return locked_run


def begin(directory: Path, *patterns: str, fresh: bool) -> None:
    """Prepares a run's directory: :func:`clear` if `fresh`, then :func:`claim`.

    Args:
      directory: The directory of the run.
      patterns: The names, or glob patterns, of the entries that the run writes.
      fresh: Whether the run starts over.
    """
    if fresh:
        clear(directory, *patterns)
    claim(directory, *patterns)


def claim(directory: Path, *patterns: str) -> None:
    """Records that entries of a directory belong to this program before they are written; creates the directory.

    Args:
      directory: The directory of the run.
      patterns: The names, or glob patterns, of entries.

    Raises:
      UserError: An entry exists that this program did not write or that is a link.
    """
    directory.mkdir(parents=True, exist_ok=True)
    claimed = _claimed(directory)
    entries = [entry for entry in sorted(directory.iterdir()) if _matches(entry.name, patterns)]
    others = [entry.name for entry in entries if entry.is_symlink() or not _matches(entry.name, claimed)]
    if others:
        raise UserError(
            f"{directory}: holds {join_names(others)}, which this program did not write; choose another --out, or "
            "move them"
        )
    if more := [pattern for pattern in patterns if pattern not in claimed]:
        with replace_file(directory / LISTING) as file:
            content = {"format": _FORMAT, "entries": [*claimed, *more]}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def clear(directory: Path, *patterns: str) -> None:
    """Removes what this program wrote to a directory; keeps other files, also in subdirectories.

    Args:
      directory: The directory of the run.
      patterns: The entries to remove; all by default.
    """
    if not directory.is_dir():
        return
    claimed = _claimed(directory)
    for entry in directory.iterdir():
        if not _matches(entry.name, claimed) or (patterns and not _matches(entry.name, patterns)):
            continue
        if entry.is_dir() and not entry.is_symlink():
            _clear_folder(entry)
        elif entry.is_file() and not entry.is_symlink():
            entry.unlink()


def remove(directory: Path) -> None:
    """Removes what this program wrote to a directory, and the directory itself if nothing else is in it."""
    clear(directory)
    if directory.is_dir() and [entry.name for entry in directory.iterdir()] == [LISTING]:
        (directory / LISTING).unlink()
        directory.rmdir()


def _clear_folder(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink() or not re.fullmatch(_INSIDE, entry.name):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _claimed(directory: Path) -> list[str]:
    path = directory / LISTING
    if not path.is_file() or path.is_symlink():
        return []
    with reading(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}")
        return [str(entry) for entry in content["entries"]]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
