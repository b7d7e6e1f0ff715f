"""Tensors in safetensors files: read lazily, a slice at a time, and written in shards."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


class Tensors(Mapping[str, tuple[int, ...]]):
    """The names and shapes of the tensors in some safetensors files, whose values are read when asked for.

    A context manager: the files are open inside its `with` block.

    Args:
      files: One or more safetensors files with distinct names of tensors.

    Raises:
      ValueError: A file is missing, truncated or damaged, or two files hold the same name.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write(file, {"w": np.arange(6.0).reshape(2, 3)})
      >>> with Tensors([file]) as tensors:
      ...     tensors["w"], tensors.read("w", (slice(0, 1), slice(2, 3)))
      ((2, 3), array([[2.]]))
    """

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self._opened = contextlib.ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> "Tensors":
        with contextlib.ExitStack() as opened:
            for path in self.files:
                file = opened.enter_context(_open(path))
                names = list(file.keys())
                if twice := sorted(self._where.keys() & names):
                    raise ValueError(f"{path}: {twice[0]!r} is in another file of the same model too.")
                self._where |= dict.fromkeys(names, (path, file))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._where = {}
        self._opened.close()

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a part of it, as a NumPy array (bfloat16 through ml_dtypes).

        Raises:
          ValueError: Its dtype is none that NumPy and JAX have in common.
        """
        stored = self._slice(name)
        try:
            # A scalar has no axis to slice.
            return self._where[name][1].get_tensor(name) if not stored.get_shape() else stored[part or (slice(None),)]
        except (SafetensorError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self._where[name][0]}: {name!r} of dtype {stored.get_dtype()} cannot be read: {error}."
            ) from error

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name][0]

    def metadata(self, name: str) -> dict[str, str]:
        """The metadata of the file that holds a tensor."""
        return self._where[name][1].metadata() or {}

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it ('F32', 'BF16')."""
        return self._slice(name).get_dtype()

    def _slice(self, name: str) -> Any:
        return self._where[name][1].get_slice(name)


def model_files(directory: str | os.PathLike) -> list[Path]:
    """The safetensors files of a model in Hugging Face layout: one, or the shards that its index lists.

    Raises:
      ValueError: There is neither, or a listed shard is missing or outside the directory.
    """
    directory = Path(directory)
    if (whole := directory / WEIGHTS).is_file():
        return [whole]
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory}: no {WEIGHTS} and no {INDEX}{pickle_beside(directory)}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' from tensors to files.")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index}: {outside[0]!r} is no file of this directory.")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:3])}.")
    return [directory / name for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: There is no such file, or it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not {type(content).__name__}.")
    return content


def write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file; `format: pt` is what PyTorch's readers want."""
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        file,
        metadata={"format": "pt", **(metadata or {})},
    )


def write_model(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a model's tensors in Hugging Face layout: one file, or shards and their index.

    Args:
      directory: An existing directory.
      tensors: Taken one at a time; no more than a shard is in memory.
      shard_bytes: The largest size of a file, unless one tensor alone is larger.

    Returns:
      The safetensors files.
    """
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        write(_shard(directory, len(shards) + 1, 0), shard)
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


def _shard(directory: Path, number: int, count: int) -> Path:
    return directory / f"model-{number:05}-of-{count:05}.safetensors"


def _open(path: Path) -> Any:
    try:
        if not path.is_file():  # a loop of links is an error of its own
            raise ValueError(f"{path}: no such file.")
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}).") from None


def pickle_beside(directory: Path) -> str:
    """The end of an error message, where there are weights as pickles."""
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")) + sorted(directory.glob("*.pth"))
    return f"; {pickles[0].name} is a pickle, which can run code: convert it to safetensors first" if pickles else ""
