"""Tensors in safetensors files, read on demand, a slice at a time; and the other files of a model directory."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.io.read_errors import reading

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes, as safetensors spells them, whose numbers are the tensor's values; others are quantized or integers."""


class Tensors(Mapping[str, tuple[int, ...]]):
    """The names and shapes of the tensors in some safetensors files; values are read on demand.

    A context manager: the files are open inside its `with` block.

    Args:
      files: One or more safetensors files with distinct names of tensors.
      ignore: Tensors to ignore, by the beginning of their name, or of a part of it between dots.

    Raises:
      ValueError: A file is missing, truncated or damaged, or two files hold the same name.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> from safetensors.numpy import save_file
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> save_file({"w": np.arange(6.0).reshape(2, 3)}, file)
      >>> with Tensors([file]) as tensors:
      ...     tensors["w"], tensors.read("w", (slice(0, 1), slice(2, 3)))
      ((2, 3), array([[2.]]))
    """

    def __init__(self, files: Iterable[Path], ignore: Sequence[str] = ()):
        self.files = tuple(files)
        self._ignore = tuple(f".{beginning}" for beginning in ignore)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> "Tensors":
        with contextlib.ExitStack() as stack:
            for path in self.files:
                file = stack.enter_context(_open(path))
                names = [name for name in list(file.keys()) if not self.ignores(name)]
                if duplicates := sorted(self._files.keys() & names):
                    raise ValueError(f"{path}: {duplicates[0]!r} is also in another file of the same model.")
                self._files |= dict.fromkeys(names, (path, file))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._files = {}
        self._stack.close()

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name is ignored."""
        return any(beginning in f".{name}" for beginning in self._ignore)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it, as a NumPy array (bfloat16 through ml_dtypes).

        Raises:
          ValueError: NumPy and JAX have no such dtype in common.
        """
        tensor = self._slice(name)
        try:
            if part is None or 0 in tensor.get_shape():  # safetensors cannot slice empty tensors
                array = self._files[name][1].get_tensor(name)
                return array if part is None else array[part]
            return tensor[part]
        except (SafetensorError, AttributeError, TypeError) as error:
            reason = "FP8 is not supported yet" if tensor.get_dtype().startswith("F8") else error
            raise ValueError(
                f"{self._files[name][0]}: {name!r} of dtype {tensor.get_dtype()} cannot be read: {reason}."
            ) from error

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name][0]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it ('F32', 'BF16')."""
        return self._slice(name).get_dtype()

    def bytes(self, name: str) -> int:
        """The size of a tensor in its file."""
        return math.prod(self[name]) * _bits(self.dtype(name)) // 8

    def _slice(self, name: str) -> Any:
        return self._files[name][1].get_slice(name)


def _bits(dtype: str) -> int:
    """The size of a number in bits, from the dtype's name as safetensors spells it ('BF16', 'F8_E4M3')."""
    return 8 if dtype == "BOOL" else int(re.sub(r"_.*|[A-Z]", "", dtype))


def model_files(directory: str | os.PathLike) -> list[Path]:
    """Returns the safetensors files of a model in Hugging Face layout: one file, or the shards that its index lists.

    Raises:
      ValueError: There is neither, or a listed shard is missing or outside the directory.
    """
    directory = Path(directory)
    if (single := directory / WEIGHTS).is_file():
        return [single]
    index = directory / INDEX
    if broken := [file for file in (single, index) if file.is_symlink() and not file.exists()]:
        raise ValueError(describe_missing(broken[0]))
    if not index.is_file():
        raise ValueError(f"{directory}: no {WEIGHTS} and no {INDEX}{pickle_hint(directory)}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: expected an object 'weight_map' from tensors to files.")
    names = sorted(set(weight_map.values()))
    if not names:
        raise ValueError(f"{index}: its 'weight_map' names no tensor.")
    if outside := [name for name in names if Path(name).name != name or name == ".."]:
        raise ValueError(f"{index}: {outside[0]!r} is not a file of this directory.")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ValueError(f"{directory}: {len(missing)} of {len(names)} shards missing: {', '.join(missing[:3])}.")
    return [directory / name for name in names]


def check_index(tensors: Tensors) -> None:
    """Raises `ValueError` unless the index of some shards lists exactly their tensors."""
    index = tensors.files[0].with_name(INDEX)
    if tensors.files[0].name == WEIGHTS or not index.is_file():
        return
    listed = read_json(index)["weight_map"]
    wrong = [name for name in sorted({*listed, *tensors}) if listed.get(name) != _file_name(tensors, name)]
    if wrong:
        actual = _file_name(tensors, wrong[0]) or "in no shard"
        raise ValueError(
            f"{index}: {wrong[0]!r} should be in {listed.get(wrong[0])}, and is {actual} ({len(wrong)} such tensors)."
        )


def _file_name(tensors: Tensors, name: str) -> str | None:
    return tensors.file_of(name).name if name in tensors else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      ValueError: There is no such file, or it is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(describe_missing(path))
    with reading(path, "JSON"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, not {type(content).__name__}.")
    return content


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(describe_missing(path))
    with reading(path, "safetensors"):
        return safe_open(path, framework="numpy")


def describe_missing(path: Path) -> str:
    """The error message for a path that does not exist, or is not a file."""
    if path.is_symlink() and not path.exists():
        return f"{path}: a broken or circular link."
    return f"{path}: is not a file." if path.exists() else f"{path}: no such file."


def pickle_hint(directory: Path) -> str:
    """The end of an error message about missing weights: names a pickle in the same directory, if there is one."""
    pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt")) + sorted(directory.glob("*.pth"))
    return f"; {pickles[0].name} is a pickle, which can run code: convert it to safetensors first" if pickles else ""
