"""The files of a pretrained model: a directory in Hugging Face layout, or a GGUF file in its place."""

import functools
import re
from collections.abc import ItemsView, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.errors import UserError, reading
from lora_jax import peft

GGUF = ".gguf"


class Tensors(Protocol):
    """Tensors by name, which are read on demand; see :class:`lora_jax.peft.Tensors`."""

    def __enter__(self) -> "Tensors": ...

    def __exit__(self, *exception: object) -> None: ...

    def __getitem__(self, name: str) -> tuple[int, ...]: ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def items(self) -> ItemsView[str, tuple[int, ...]]: ...

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it."""
        ...

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        ...

    def dtype(self, name: str) -> str:
        """The stored type of a tensor."""
        ...


class Codes(Protocol):
    """The codes of tensors that are stored in GGUF's quantized types."""

    def __contains__(self, name: object, /) -> bool: ...

    def kind(self, name: str) -> str | None:
        """Returns the type of a tensor's codes; None if it is stored as numbers."""
        ...

    def rows(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """Returns the blocks of codes of some rows of a matrix or table, `uint8[rows, bytes]`."""
        ...


class ModelFiles(Protocol):
    """The files of a model by their names in Hugging Face layout."""

    @property
    def path(self) -> Path:
        """The directory, or the file that holds all of them."""
        ...

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        ...

    def where(self, name: str) -> str:
        """Returns the location of a file's content, for error messages."""
        ...

    @property
    def has_weights(self) -> bool:
        """Whether there are weights."""
        ...

    def read(self, name: str) -> str | None:
        """Returns the content of a text file such as `config.json`; None if there is none."""
        ...

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file."""
        ...

    def tensors(self) -> Tensors:
        """Returns the weights."""
        ...

    def codes(self) -> Codes | None:
        """Returns the codes of the weights; None if none are stored as GGUF's codes."""
        ...


class HuggingFaceFiles:
    """A directory in Hugging Face layout."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def weights(self) -> list[Path]:
        """The safetensors files.

        Raises:
          UserError: There are none.
        """
        try:
            return peft.model_files(self.path)
        except ValueError as error:
            raise UserError(str(error)) from None

    def where(self, name: str) -> str:
        """Returns the path of a file."""
        return str(self.path / name)

    @property
    def has_weights(self) -> bool:
        """Whether there are safetensors files."""
        return any((self.path / name).is_file() for name in (peft.WEIGHTS, peft.INDEX))

    def read(self, name: str) -> str | None:
        """Returns the content of a text file; None if there is none."""
        path = self.path / name
        if not path.exists():
            return None
        with reading(path, "UTF-8 text"):
            return path.read_text("utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in a file.

        Raises:
          UserError: The file is missing or not a JSON object.
        """
        try:
            return peft.read_json(self.path / name)
        except ValueError as error:
            raise UserError(str(error)) from None

    def tensors(self) -> peft.Tensors:
        """Returns the tensors of the safetensors files."""
        return peft.Tensors(self.weights)

    def codes(self) -> None:
        """Returns None: safetensors have no codes of GGUF."""


def open_files(path: Path) -> ModelFiles:
    """Opens the files of a model.

    Args:
      path: A directory in Hugging Face layout, a GGUF file, or a directory that holds one.

    Raises:
      UserError: The directory holds several GGUF files, or the file cannot be used.
    """
    file = find_gguf(path)
    if file is None:
        return HuggingFaceFiles(path)
    state = file.stat()
    return _open_gguf(file, state.st_mtime_ns, state.st_size)


def find_gguf(path: Path) -> Path | None:
    """Returns the GGUF file at a path: the file itself, or the only one of a directory without safetensors.

    Raises:
      UserError: The directory holds several.
    """
    if path.suffix == GGUF and not path.is_dir():
        return path
    if any(path.glob("*.safetensors*")):
        return None
    models = first_files(file.name for file in path.glob(f"*{GGUF}"))
    if len(models) > 1:
        raise UserError(f"{path}: holds {len(models)} models, name the file of one of them: {', '.join(models)}")
    return path / models[0] if models else None


def first_files(names: Iterable[str]) -> list[str]:
    """Returns the file of each GGUF model, of a model in several files the first."""
    models: dict[str, str] = {}
    for name in sorted(names):
        models.setdefault(all_files(name), name)
    return list(models.values())


def all_files(name: str) -> str:
    """Returns a glob pattern of all files of a GGUF model, from the name of one: `MODEL.gguf` or
    `MODEL-00001-of-00002.gguf`."""
    return re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", name)


@functools.lru_cache(maxsize=2)
def _open_gguf(file: Path, modified: int, size: int) -> Any:
    from experiments.pretrained.gguf.files import GgufFiles  # the package needs half a second to import

    return GgufFiles(file)
