"""Writes safetensors files: adapters, and models in shards with their index."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.peft.tensors import INDEX, WEIGHTS

SHARD_BYTES = 5 * 10**9
WRITTEN_BY = {"written_by": "lora_jax"}
"""Metadata of the files that this library writes; it replaces no others."""


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file, with the metadata `format: pt` that PyTorch's readers require.

    Raises:
      OSError: It cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt", **WRITTEN_BY, **(metadata or {})})
    except SafetensorError as error:  # for example, the disk is full
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(*((int(code[1]), os.strerror(int(code[1]))) if code else (str(error),))) from error
    _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Sorts the metadata of a safetensors file, which the safetensors library writes in random order."""
    begin = b'"__metadata__":'
    with open(file, "r+b") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        start = header.index(begin) + len(begin)
        rest = header[start:].decode()
        metadata, end = json.JSONDecoder().raw_decode(rest)
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) == len(rest[:end].encode()):
            stream.seek(8 + start)
            stream.write(text)


def write_model(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a model's tensors in Hugging Face layout: one file, or shards and their index.

    Args:
      directory: An existing directory.
      tensors: Names and values, consumed one at a time; at most one shard is in memory.
      shard_bytes: The largest size of a file, unless a single tensor is larger.

    Returns:
      The safetensors files.
    """
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write_tensors(_shard(directory, len(shards) + 1, 0), shard)
        shards.append(list(shard))
        shard.clear()

    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = array
        size += array.nbytes
        total += array.nbytes
    flush()
    if len(shards) == 1:
        return [_shard(directory, 1, 0).rename(directory / WEIGHTS)]
    count = len(shards)
    files = [_shard(directory, i + 1, 0).rename(_shard(directory, i + 1, count)) for i in range(count)]
    weight_map = {name: file.name for file, names in zip(files, shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def ownership_test(names: Collection[str]) -> Callable[[Path], bool]:
    """Returns a test for files that this library wrote: marked safetensors files, and files of some names with them."""

    def owns(entry: Path) -> bool:
        if entry.suffix == ".safetensors":
            return _is_marked(entry)
        return entry.name in names and any(map(_is_marked, entry.parent.glob("*.safetensors")))

    return owns


def _is_marked(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy") as reader:
            metadata = reader.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return metadata.items() >= WRITTEN_BY.items()


def _shard(directory: Path, number: int, count: int) -> Path:
    return directory / f"model-{number:05}-of-{count:05}.safetensors"
