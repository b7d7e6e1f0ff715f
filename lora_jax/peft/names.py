"""Tables of names: which tensors of a PyTorch checkpoint hold each leaf of a model. Data, not a converter per model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from lora_jax.paths import nearest
from lora_jax.peft.weights import Binding, Weight
from lora_jax.renamed import former_members, module_getattr

SAME = ""
LINEAR = "in out -> out in"
CONV1D = "width in out -> out in width"
CONV2D = "height width in out -> out in height width"
CONV3D = "depth height width in out -> out in depth height width"


@dataclasses.dataclass(frozen=True)
class Fused:
    """A parameter of PyTorch's running model that holds one or several matrices of each expert, `[experts, out, in]`.

    transformers 5 builds it from the experts' own tensors when it loads them; adapters target the parameter.

    Attributes:
      parameter: Its name, `model.layers.{layer}.mlp.experts.gate_up_proj`.
      parts: The names of an expert's matrices in checkpoint files, with `{expert}`, in their order along `out`.
    """

    parameter: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
@former_members(place="get", in_files="with_file_names")
class Names:
    """The names of a model's weights in PyTorch; a model declares them once.

    Attributes:
      weights: Rows; the first row that matches a leaf applies. Several parameters of one module (experts) are
        listed in the order in which PyTorch's module defines them.
      prefix: A prefix of every name that checkpoints of the bare model omit ('bert.').
      fused: Parameters of the running model that combine several tensors; those of one module in its order.

    Example:
      >>> names = Names((Weight("wte/embedding", "wte.weight", module="embedding"),))
      >>> list(names.find("wte/embedding", (8, 2)).shapes)
      ['wte.weight']
    """

    weights: tuple[Weight, ...]
    prefix: str = ""
    fused: tuple[Fused, ...] = ()

    def get(self, path: str, shape: Sequence[int]) -> Binding | None:
        """Binds a leaf to its tensors; returns None if no row matches its path.

        Raises:
          ValueError: Its shape does not fit the row that matches.
        """
        rows = [*self._patterns, *([self._literals[path]] if path in self._literals else [])]
        for number in sorted(rows):
            if binding := self.weights[number].bind(path, shape):
                return binding
        return None

    def find(self, path: str, shape: Sequence[int]) -> Binding:
        """Binds a leaf to its tensors.

        Raises:
          ValueError: No row matches its path, or its shape does not fit the row that does.
        """
        if (binding := self.get(path, shape)) is None:
            raise ValueError(f"no name is declared for {path!r}; {nearest(path, [row.path for row in self.weights])}")
        return binding

    @functools.cached_property
    def _literals(self) -> dict[str, int]:
        """The first row of each path without placeholder: a checkpoint's own names are thousands of these."""
        numbered = reversed(list(enumerate(self.weights)))
        return {row.path: number for number, row in numbered if "{" not in row.path}

    @functools.cached_property
    def _patterns(self) -> list[int]:
        return [number for number, row in enumerate(self.weights) if "{" in row.path]

    def with_file_names(self) -> "Names":
        """The same weights by their names in checkpoint files only."""
        return dataclasses.replace(
            self, weights=tuple(dataclasses.replace(row, in_model="") for row in self.weights), fused=()
        )


def check_names(caller: str, names: Any) -> None:
    """Raises `TypeError` unless `names` is a table of names."""
    if not isinstance(names, Names):
        raise TypeError(
            f"{caller}: expected a lora.peft.Names as names, which lists each leaf's tensors in PyTorch; got "
            f"{type(names).__name__}."
        )


__getattr__ = module_getattr(__name__, Place="lora_jax.peft.Binding")
