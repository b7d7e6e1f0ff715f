"""A view of an adapter's tensors under other names."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from lora_jax.peft.tensors import Tensors


class View(Mapping[str, tuple[int, ...]]):
    """Tensors under other names, read from their files on demand.

    Args:
      tensors: The open files.
      names: The view's names, with those in the files.
      transposed: The view's names of matrices that it transposes.
      slices: By the view's name of an expert's matrix, its index along the first axis of the stored tensor.
    """

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str],
        transposed: Collection[str] = (),
        slices: Mapping[str, int] | None = None,
    ):
        self._tensors, self._names, self._transposed = tensors, dict(names), frozenset(transposed)
        self._slices = dict(slices or {})

    def __getitem__(self, name: str) -> tuple[int, ...]:
        shape = self._tensors[self._names[name]]
        if name in self._slices:
            return shape[1:]
        return shape[::-1] if name in self._transposed else shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """See :meth:`Tensors.read`."""
        if (index := self._slices.get(name)) is not None:
            return self._tensors.read(self._names[name], (slice(index, index + 1), *(part or ())))[0]
        if name not in self._transposed:
            return self._tensors.read(self._names[name], part)
        return self._tensors.read(self._names[name], None if part is None else part[::-1]).T

    def ignores(self, name: str) -> bool:
        """See :meth:`Tensors.ignores`."""
        return self._tensors.ignores(name)

    def dtype(self, name: str) -> str:
        """See :meth:`Tensors.dtype`."""
        return self._tensors.dtype(self._names[name])

    def file_of(self, name: str) -> Path:
        """See :meth:`Tensors.file_of`."""
        return self._tensors.file_of(self._names[name])
