"""A module's factors, as PyTorch keeps them, as parts of a leaf's factors; and back."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT
from lora_jax.peft.names import Place


@dataclasses.dataclass(frozen=True)
class Labeled:
    """An array with a label for each of its axes."""

    array: np.ndarray
    labels: tuple[str, ...]

    def at(self, index: Mapping[str, int]) -> "Labeled":
        """The part at one place of some labels; those that it has not are passed over."""
        picked = self.array[tuple(index.get(label, slice(None)) for label in self.labels)]
        return Labeled(picked, tuple(label for label in self.labels if label not in index))

    def ordered(self, labels: Sequence[str]) -> np.ndarray:
        """The array with its axes in the order of `labels`."""
        return self.array.transpose([self.labels.index(label) for label in labels])


class Fit:
    """How the factors of a leaf and of its modules correspond.

    A tensor's axes are batch (experts), in or out by its module; so are the labels of these axes, and the
    axes of the leaf. A label that runs over tensors is either an axis of the leaf (`batch`: layers), or the
    slower part of an out axis (`block`: the parts of a fused kernel).

    Attributes:
      place: The leaf and its tensors.
      axes: The role of each axis of the leaf.
      tensor_roles: The role of each axis of a tensor.
      block: The label that splits the out axis; None without.
    """

    def __init__(self, place: Place):
        roles = place.roles
        if roles is None:
            raise ValueError(f"{place.path!r} is no matrix; low-rank factors do not fit it")
        self.place = place
        self.tensor_roles = tuple(IN if role == LOOKUP else role for role in roles)
        by_label = {x: role for labels, role in zip(place.right, self.tensor_roles) for x in labels}
        self.block: str | None = None
        axes = []
        for labels in place.left:
            found = {by_label[x] for x in labels if x in by_label}
            if len(found) > 1:
                raise ValueError(
                    f"{place.path!r}: the axis {' '.join(labels)} is {' and '.join(sorted(found))} at once"
                )
            running = [x for x in labels if x not in by_label]
            if found and running:
                if found != {OUT} or running != [labels[0]] or self.block:
                    raise ValueError(f"{place.path!r}: the parts {running[0]!r} do not split one out axis evenly")
                self.block = running[0]
            axes.append(found.pop() if found else BATCH)
        self.axes = tuple(axes)

    def labels(self, role: str) -> list[tuple[str, ...]]:
        """The labels of the leaf's axes of one role, without the block."""
        groups = [labels for labels, found in zip(self.place.left, self.axes) if found == role]
        return [tuple(x for x in labels if x != self.block) for labels in groups]

    def tensor_labels(self, role: str) -> list[tuple[str, ...]]:
        """The labels of the tensor's axes of one role."""
        return [labels for labels, found in zip(self.place.right, self.tensor_roles) if found == role]

    def size(self, groups: Sequence[tuple[str, ...]]) -> list[int]:
        return [math.prod(self.place.sizes[x] for x in labels) for labels in groups]

    @property
    def experts(self) -> list[str]:
        """The labels of batch axes that a tensor itself has."""
        return [x for labels in self.tensor_labels(BATCH) for x in labels]

    def to_leaf(self, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
        """A tensor's factor `[*experts, rank, *axes]` with the axes of the leaf: same lead, other grouping."""
        return self._regroup(factor, self.tensor_labels(role), self.labels(role), rank)

    def to_tensor(self, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
        """The inverse of :meth:`to_leaf`."""
        return self._regroup(factor, self.labels(role), self.tensor_labels(role), rank)

    def _regroup(self, factor, given, wanted, rank: bool) -> np.ndarray:
        lead = factor.shape[: len(self.experts) + rank]
        flat, order = list(itertools.chain(*given)), list(itertools.chain(*wanted))
        array = factor.reshape(*lead, *(self.place.sizes[x] for x in flat))
        axes = [*range(len(lead)), *(len(lead) + flat.index(x) for x in order)]
        return array.transpose(axes).reshape(*lead, *self.size(wanted))

    def rows(self) -> tuple[str, str]:
        """The role of the axis that PyTorch has rows along, and the other: a linear layer has a row for each output."""
        return (IN, OUT) if self.tensor_roles[0] == IN else (OUT, IN)

    def lead(self) -> tuple[list[str], list[int]]:
        """The labels of the leaf's batch axes, then the block, with their sizes."""
        labels = [x for group in self.labels(BATCH) for x in group] + ([self.block] if self.block else [])
        return labels, [self.place.sizes[x] for x in labels]

    def at(self, index: Sequence[int]) -> tuple[Any, ...]:
        """Where in the leaf's lead axes the factors of a tensor are, from its index in `place.running`."""
        known = dict(zip(self.place.running, index))
        return tuple(known.get(label, slice(None)) for label in self.lead()[0])


def pad_rank(factor: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A factor with rows of zeros up to a rank."""
    widths = [(0, 0)] * factor.ndim
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths)
