"""A module of a PyTorch model with the tensors that a PEFT adapter has for it; loading and saving share it."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import jax.numpy as jnp
import numpy as np

from lora_jax.peft import keys
from lora_jax.peft.tensors import Tensors
from lora_jax.peft.view import View

_CACHE_SIZE = 4


@dataclasses.dataclass(frozen=True)
class ExpertSlice:
    """The position of one expert's matrix in a parameter that holds the matrices of all experts.

    Attributes:
      expert: The expert's index.
      part: The index of the matrix among the expert's matrices.
      experts: The number of experts.
      parts: The number of an expert's matrices in the parameter.
    """

    expert: int
    part: int
    experts: int
    parts: int


class AdapterTensors(Mapping[str, tuple[int, ...]]):
    """The shapes of an adapter's tensors by key; values are read on demand and checked."""

    def __init__(self, tensors: Tensors | View):
        self._tensors = tensors
        self._recent: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def __getitem__(self, key: str) -> tuple[int, ...]:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def ignores(self, name: str) -> bool:
        """See :meth:`Tensors.ignores`."""
        return self._tensors.ignores(name)

    def file_of(self, name: str) -> Path:
        """See :meth:`Tensors.file_of`."""
        return self._tensors.file_of(name)

    def read(self, key: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """See :meth:`Tensors.read`."""
        return self._tensors.read(key, part)

    def describe(self, key: str) -> str:
        """A key and its shape, for messages."""
        return f"{key} {self[key]}"

    def read_checked(self, key: str, shape: Sequence[int], *, cache: bool = False) -> np.ndarray:
        """Reads a tensor.

        Args:
          key: The tensor's key.
          shape: The shape that it must have.
          cache: Whether to hold the value for further reads; the last few values are held.

        Raises:
          ValueError: It has another shape, is not of floats, or holds NaN or Inf.
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
    """A tensor of an adapter's open files, read when its values are needed.

    Attributes:
      key: Its key.
      tensors: The adapter's tensors.
    """

    key: str
    tensors: AdapterTensors

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.tensors[self.key]

    def read(self, shape: Sequence[int] | None = None, *, cache: bool = False) -> np.ndarray:
        """Reads the values; see :meth:`AdapterTensors.read_checked`. None accepts any shape."""
        return self.tensors.read_checked(self.key, self.shape if shape is None else shape, cache=cache)


Tensor = TypeVar("Tensor", StoredTensor, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Module(Generic[Tensor]):
    """A weight of a PyTorch model with the tensors that an adapter has for it, in PEFT's layout.

    Attributes:
      name: The weight's name in PyTorch's running model, `model.layers.0.mlp.up_proj.weight`.
      kind: The kind of its module, as in `Weight.module`.
      tensors: By part; stored tensors in an adapter that is loaded, arrays in one that is saved. LoRA has 'a'
        `(rank, in, …)`, 'b' `(out, rank, 1…)`, for experts `(rank·experts, in)` and `(out, rank·experts)`, 'magnitude'
        (DoRA's) and 'b_bias' (the bias on B, which the scale multiplies too). Other methods have parts of their own.
      rank: The rank of each expert's, or group's, product.
      scale: The factor of the product.
      dropout: The dropout rate.
      is_parameter: Whether PEFT targets the parameter (`target_parameters`) instead of the module.
      expert: For an expert's matrix, its position in the parameter that the tensors are for.
      tied: Whether it is the second use of another module's weight.
    """

    name: str
    kind: str
    tensors: Mapping[str, Tensor]
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0
    is_parameter: bool = False
    expert: ExpertSlice | None = None
    tied: bool = False

    @property
    def path(self) -> str:
        """The module's path."""
        return keys.split_name(self.name)[0]

    @property
    def parameter(self) -> str:
        """The parameter's name in its module."""
        return keys.split_name(self.name)[1]

    @property
    def label(self) -> str:
        """The text that the config's patterns match."""
        return self.name if self.is_parameter else self.path
