"""The leaves of a base by the names of their PyTorch tensors."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.leaves import is_abstract
from lora_jax.peft import experts, keys
from lora_jax.peft.module import ExpertSlice
from lora_jax.peft.names import Names
from lora_jax.peft.weights import Binding


def bindings_of(base: Any, names: Names) -> Iterator[tuple[str, Binding]]:
    """Yields the path of each leaf of a base that a table of names lists, and its binding."""
    for path, leaf in paths.flatten(base).as_dict().items():
        if hasattr(leaf, "shape") and (binding := names.get(path, leaf.shape)) is not None:
            yield path, binding


class BaseIndex:
    """The tensors of a base, by name.

    Keys are names in checkpoint files without the prefix of the table of names. Adapters have the names of PyTorch's
    running model.

    Attributes:
      leaves: The base's leaves by path.
      tensors: By tensor, the leaf's binding and the tensor's index in it.
      tied: By further name of a tied tensor, the tensor that it equals.
      rows: By tensor, the number of its row in the table of names.
      in_files: By name in the running model, without prefix, the name in checkpoint files.
      in_model: By tensor, its full name in the running model.
      fused: By fused parameter, the experts' tensors that it combines and their positions.
    """

    def __init__(self, base: Any, names: Names):
        self.leaves = paths.flatten(base).as_dict()
        self.tensors: dict[str, tuple[Binding, tuple[int, ...]]] = {}
        self.tied: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.in_files: dict[str, str] = {}
        self.in_model: dict[str, str] = {}
        self._prefix = names.prefix
        numbers = {id(row): number for number, row in enumerate(names.weights)}
        full_names = []
        for _, binding in bindings_of(base, names):
            full_names += binding.tensors
            self.tensors |= {self.bare(name): (binding, index) for name, index in binding.tensors.items()}
            self.in_files |= {self.bare(new): self.bare(name) for name, new in binding.in_model.items()}
            self.in_model |= {self.bare(name): new for name, new in binding.in_model.items()}
            self.rows |= dict.fromkeys(map(self.bare, binding.tensors), numbers[id(binding.weight)])
            self.tied |= {self.bare(other): self.bare(name) for other, name in binding.tied.items()}
        self.fused: dict[str, list[tuple[str, ExpertSlice]]] = {
            self.bare(parameter): [(self.bare(name), position) for name, position in parts]
            for parameter, parts in experts.find_parts(names, dict.fromkeys(full_names)).items()
        }

    def bare(self, name: str) -> str:
        """A name without the prefix."""
        return name.removeprefix(self._prefix)

    def file_name(self, name: str) -> str:
        """The name in checkpoint files of a tensor of the running model, without the prefix."""
        return self.in_files.get(self.bare(name), self.bare(name))

    def binding(self, name: str) -> Binding:
        """The binding of a tensor's leaf."""
        return self.tensors[name][0]

    def bias(self, weight: str) -> str | None:
        """The name of the bias of a weight's module; None if the base has none."""
        name = keys.split_name(weight)[0] + ".bias"
        return name if name in self.tensors else None

    def leaf(self, path: str) -> np.ndarray:
        """The value of a leaf.

        Raises:
          ValueError: The base has its shape only.
        """
        if is_abstract(self.leaves[path]):
            raise ValueError(f"{path!r}: its value is needed, and the base has its shape only")
        return np.asarray(self.leaves[path])

    def has_value(self, name: str, value: np.ndarray) -> bool:
        """Whether a tensor of the base equals a value, in the value's dtype."""
        binding, index = self.tensors[name]
        tensor = next(tensor for tensor, position in binding.tensors.items() if position == index)
        return bool((binding.split(self.leaf(binding.path))[tensor].astype(value.dtype) == value).all())
