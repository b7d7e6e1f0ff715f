"""The tensors of a GGUF file by the names of Hugging Face's checkpoint, with the interface of `peft.Tensors`."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from experiments.pretrained.gguf.names import View, views
from experiments.pretrained.gguf.reader import Content


class GgufTensors(Mapping[str, tuple[int, ...]]):
    """The names and shapes of the tensors of a model; values are read on demand, dequantized if they are codes.

    Args:
      content: The file.
    """

    def __init__(self, content: Content):
        self._views = views(content)

    def __enter__(self) -> "GgufTensors":
        return self

    def __exit__(self, *exception: object) -> None:
        """Does nothing: the operating system keeps the mapped pages of a file only while it has memory for them."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def view(self, name: str) -> View:
        """Where and how the file holds a tensor."""
        return self._views[name]

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it: floats as they are stored, dequantized codes in float32."""
        return self._views[name].read(part)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._views[name].stored.file

    def dtype(self, name: str) -> str:
        """The type of a tensor as GGUF spells it ('F32', 'Q4_K')."""
        return self._views[name].stored.kind.name
