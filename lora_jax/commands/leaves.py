"""Tensors of PyTorch's files as leaves of a base: paths are names with slashes, layouts are PyTorch's."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from lora_jax.peft.names import Names
from lora_jax.peft.weights import ModuleKind, Weight

Kind = ModuleKind | Literal[""]


class LazyTensor:
    """A tensor in a file as a leaf, read when its values are needed."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[], np.ndarray]):
        self.shape = shape
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype)


def leaf_path(name: str) -> str:
    """Returns the path of a tensor's leaf."""
    return name.replace(".", "/")


def make_names(
    names: Iterable[str],
    kinds: Mapping[str, Kind],
    tied: Mapping[str, tuple[str, ...]],
    prefix: str = "",
    in_model: Mapping[str, str] | None = None,
) -> Names:
    """Makes the table of names for leaves that are tensors.

    Args:
      names: The names of the tensors.
      kinds: The kinds of modules, by tensor.
      tied: The names of tied tensors, by tensor.
      prefix: See :class:`Names`.
      in_model: The names in PyTorch's running model, by tensor; those that differ.
    """
    new = in_model or {}
    rows = [
        Weight(leaf_path(x), x, module=kinds.get(x, ""), tied=tied.get(x, ()), in_model=new.get(x, "")) for x in names
    ]
    return Names(tuple(rows), prefix=prefix)
