"""A run's directory: one run at a time, and only what this program wrote is replaced or removed."""

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
        r"adapter\.json|arrays(-[0-9a-f]{32})?",
        r"adapter_config\.json|adapter_model\.safetensors|classifier\.safetensors|README\.md",
        r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|tokenizer.*|special_tokens_map\.json|vocab\.txt",
        r"\..*\.(writing|replaced)(\..+)?|\.unfinished-\d+",
    )
)
"""What this program writes into the directories that it lists."""


def exclusive(run: Callable[[Any], R]) -> Callable[[Any], R]:
    """Makes a study's `run(config)` hold the lock of `config.out`; of several processes the first one holds it."""

    @functools.wraps(run)
    def running(config: Any) -> R:
        out = config.out
        processes.check_shared(out)
        with ExitStack() as stack:
            with processes.first_before_others():
                if processes.is_first():
                    if os.path.lexists(out) and not out.is_dir():
                        raise UserError(f"out {out}: is {'a link' if out.is_symlink() else 'a file'}, not a directory")
                    stack.enter_context(create_parents(out / LISTING))
                    stack.enter_context(lock.held(out))
            return run(config)

    return running


def begin(directory: Path, *patterns: str, fresh: bool, cached: Sequence[str] = ()) -> None:
    """Prepares a run's directory: :func:`clear` where it is to be fresh, then :func:`claim`.

    Args:
      directory: Of a run.
      patterns: What the run writes.
      fresh: Whether it starts over.
      cached: What it writes and never has to write again.
    """
    if fresh:
        clear(directory, *patterns)
    claim(directory, *patterns, *cached)


def claim(directory: Path, *patterns: str) -> None:
    """Notes that entries of a directory are this program's, before it writes them; the directory is made.

    Args:
      directory: Of a run.
      patterns: Names, or patterns as a shell has them.

    Raises:
      UserError: An entry is there that this program did not write, or is a link.
    """
    directory.mkdir(parents=True, exist_ok=True)
    claimed = _claimed(directory)
    entries = [entry for entry in sorted(directory.iterdir()) if _matches(entry.name, patterns)]
    others = [entry.name for entry in entries if entry.is_symlink() or not _matches(entry.name, claimed)]
    if others:
        raise UserError(
            f"{directory}: holds {join_names(others)}, which this program did not write there; give another --out, or "
            "move what is there"
        )
    if more := [pattern for pattern in patterns if pattern not in claimed]:
        with replace_file(directory / LISTING) as file:
            content = {"format": _FORMAT, "entries": [*claimed, *more]}
            file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def clear(directory: Path, *patterns: str) -> None:
    """Removes what this program wrote into a directory; files of others stay, in the directories that it made too.

    Args:
      directory: Of a run.
      patterns: What to remove of that; nothing means everything.
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
            raise ValueError(f"its format is {content['format']!r}")
        return [str(entry) for entry in content["entries"]]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
