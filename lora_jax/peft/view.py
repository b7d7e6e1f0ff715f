"""Some tensors of an adapter under other names."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_jax.peft.tensors import Tensors


class View(Mapping[str, tuple[int, ...]]):
    """Tensors under other names, read from where they are.

    Args:
      tensors: The open files.
      names: The names to show, and those in the files.
    """

    def __init__(self, tensors: Tensors, names: Mapping[str, str]):
        self._tensors, self._names = tensors, dict(names)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._tensors.read(self._names[name], part)

    def dtype(self, name: str) -> str:
        return self._tensors.dtype(self._names[name])

    def file_of(self, name: str) -> Path:
        return self._tensors.file_of(self._names[name])
