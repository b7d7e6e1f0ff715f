"""A module of a PyTorch model with the tensors that a PEFT adapter has for it; loading and saving share it."""

import dataclasses
from collections.abc import Mapping
from typing import Generic, TypeVar

import numpy as np

from lora_jax.peft import keys
from lora_jax.peft.adapter_tensors import StoredTensor


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
