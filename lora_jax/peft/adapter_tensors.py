"""The tensors of an adapter, under PEFT's names."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lora_jax.peft.tensors import Tensors

_CACHE_SIZE = 4


class AdapterTensors(Mapping[str, tuple[int, ...]]):
    """The shapes of an adapter's tensors by key; values are read from the open files on demand.

    Args:
      tensors: The open files.
      names: The names in the files, by key; None if they are equal.
      transposed: The keys of matrices that the files store transposed.
      slices: By key of an expert's matrix, its index along the first axis of the stored tensor.
    """

    def __init__(
        self,
        tensors: Tensors,
        names: Mapping[str, str] | None = None,
        transposed: Collection[str] = (),
        slices: Mapping[str, int] | None = None,
    ):
        self._tensors, self._transposed, self._slices = tensors, frozenset(transposed), dict(slices or {})
        self._names = dict(names) if names is not None else {name: name for name in tensors}
        self._recent: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def __getitem__(self, key: str) -> tuple[int, ...]:
        shape = self._tensors[self._names[key]]
        if key in self._slices:
            return shape[1:]
        return shape[::-1] if key in self._transposed else shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def ignores(self, name: str) -> bool:
        """See :meth:`Tensors.ignores`."""
        return self._tensors.ignores(name)

    def file_of(self, key: str) -> Path:
        """See :meth:`Tensors.file_of`."""
        return self._tensors.file_of(self._names[key])

    def describe(self, key: str) -> str:
        """A key and its shape, for messages."""
        return f"{key} {self[key]}"

    def read(self, key: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """See :meth:`Tensors.read`."""
        if (index := self._slices.get(key)) is not None:
            return self._tensors.read(self._names[key], (slice(index, index + 1), *(part or ())))[0]
        if key not in self._transposed:
            return self._tensors.read(self._names[key], part)
        return self._tensors.read(self._names[key], None if part is None else part[::-1]).T

    def read_checked(self, key: str, shape: Sequence[int], *, cache: bool = False) -> np.ndarray:
        """Reads a tensor and checks it.

        Args:
          key: The tensor's key.
          shape: The shape that it must have.
          cache: Whether to hold the value for further reads; the last few values are held.

        Raises:
          ValueError: It has another shape, is not of floats, or has NaN or Inf.
        """
        if self[key] != tuple(shape):
            raise ValueError(f"shape: {self.describe(key)}, expected {tuple(shape)}")
        if key in self._recent:
            return self._recent[key]
        value = self.read(key)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"dtype: {key} is {value.dtype}, expected floats")
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"not finite: {key}")
        if cache:
            self._recent[key] = value
            if len(self._recent) > _CACHE_SIZE:
                self._recent.popitem(last=False)
        return value


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of an adapter's open files, read when its values are needed.

    Attributes:
      key: Its key.
      tensors: The adapter's tensors.
    """

    key: str
    tensors: AdapterTensors

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensors[self.key]

    def read(self, shape: Sequence[int] | None = None, *, cache: bool = False) -> np.ndarray:
        """Reads the values; see :meth:`AdapterTensors.read_checked`. None accepts any shape."""
        return self.tensors.read_checked(self.key, self.shape if shape is None else shape, cache=cache)
