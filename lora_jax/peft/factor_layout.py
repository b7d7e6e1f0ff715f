"""The axes of a leaf's factors, and conversion between them and the axes of PyTorch modules' factors."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT
from lora_jax.peft.weights import Binding


class FactorLayout:
    """The axes of a leaf's factors, and those of its PyTorch modules' factors.

    A module defines whether each axis of its tensor, and each label of that axis, is a batch (experts), in or out
    axis; the leaf's axes follow from their labels. A label that enumerates tensors is either an axis of the leaf
    (`batch`: layers), or the slower part of an out axis (`block`: the parts of a fused kernel).

    Attributes:
      binding: The leaf and its tensors.
      axes: The role of each axis of the leaf.
      tensor_roles: The role of each axis of a tensor.
      block: The label that splits the out axis; None without.
    """

    def __init__(self, binding: Binding):
        roles = binding.roles
        if roles is None:
            raise ValueError(f"{binding.path!r} is not a matrix, so low-rank factors do not apply")
        self.binding = binding
        self.tensor_roles = tuple(IN if role == LOOKUP else role for role in roles)
        by_label = {x: role for labels, role in zip(binding.tensor_axes, self.tensor_roles) for x in labels}
        self.block: str | None = None
        axes = []
        for labels in binding.leaf_axes:
            axis_roles = {by_label[x] for x in labels if x in by_label}
            if len(axis_roles) > 1:
                raise ValueError(
                    f"{binding.path!r}: the axis {' '.join(labels)} has several roles: {', '.join(sorted(axis_roles))}"
                )
            enumerated = [x for x in labels if x not in by_label]
            if axis_roles and enumerated:
                if axis_roles != {OUT} or enumerated != [labels[0]] or self.block:
                    raise ValueError(f"{binding.path!r}: the parts {enumerated[0]!r} do not split one out axis evenly")
                self.block = enumerated[0]
            axes.append(axis_roles.pop() if axis_roles else BATCH)
        self.axes = tuple(axes)

    def labels(self, role: str) -> list[tuple[str, ...]]:
        """The labels of each of the leaf's axes of one role, without the block."""
        groups = [labels for labels, other in zip(self.binding.leaf_axes, self.axes) if other == role]
        return [tuple(x for x in labels if x != self.block) for labels in groups]

    def tensor_labels(self, role: str) -> list[tuple[str, ...]]:
        """The labels of each of the tensor's axes of one role."""
        return [labels for labels, other in zip(self.binding.tensor_axes, self.tensor_roles) if other == role]

    def sizes(self, groups: Sequence[tuple[str, ...]]) -> list[int]:
        """The size of each axis, given its labels."""
        return [math.prod(self.binding.sizes[x] for x in labels) for labels in groups]

    @property
    def expert_labels(self) -> list[str]:
        """The labels of the batch axes that each tensor has."""
        return [x for labels in self.tensor_labels(BATCH) for x in labels]

    def to_leaf(self, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
        """Regroups a tensor's factor `[*experts, rank, *axes]` into the leaf's axes; leading axes do not change."""
        return self._regroup(factor, self.tensor_labels(role), self.labels(role), rank)

    def to_tensor(self, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
        """The inverse of :meth:`to_leaf`."""
        return self._regroup(factor, self.labels(role), self.tensor_labels(role), rank)

    def _regroup(
        self, factor: np.ndarray, source: list[tuple[str, ...]], target: list[tuple[str, ...]], rank: bool
    ) -> np.ndarray:
        lead = factor.shape[: len(self.expert_labels) + rank]
        labels, order = list(itertools.chain(*source)), list(itertools.chain(*target))
        array = factor.reshape(*lead, *(self.binding.sizes[x] for x in labels))
        axes = [*range(len(lead)), *(len(lead) + labels.index(x) for x in order)]
        return array.transpose(axes).reshape(*lead, *self.sizes(target))

    def row_roles(self) -> tuple[str, str]:
        """The role of the axis that PyTorch's rows enumerate, then the other: a linear layer has a row per output."""
        return (IN, OUT) if self.tensor_roles[0] == IN else (OUT, IN)

    @property
    def leading_labels(self) -> list[str]:
        """The labels of the leaf's batch axes, then the block."""
        return [x for group in self.labels(BATCH) for x in group] + ([self.block] if self.block else [])

    @property
    def leading_sizes(self) -> list[int]:
        """The size of each of `leading_labels`."""
        return [self.binding.sizes[x] for x in self.leading_labels]

    def slices(self, index: Sequence[int]) -> tuple[Any, ...]:
        """The index, along the leading axes, of one tensor's factors; `index` is its entry of `binding.tensors`."""
        positions = dict(zip(self.binding.index_labels, index))
        return tuple(positions.get(label, slice(None)) for label in self.leading_labels)


def pad_rank(factor: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """Pads a factor with rows of zeros to a rank."""
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths)
