"""The labels of the axes of a contraction: what a rule states, and what follows for input, weight and result."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from lora_jax.adapters.factored import Factor, Label
from lora_jax.transform.taps import Moments
from lora_jax.transform.weight import CannotFactor, Weight

Pairs = Sequence[tuple[Label, int]]
"""Labels with sizes."""

TOKENS = "tokens"
"""Start of the labels of axes of the input and the result that the weight does not have."""


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Which axes an operation contracts, and how to run it.

    Attributes:
      contracted: For each axis of the weight that is summed, the axis of the input that it is summed with; None if the
        operation sums over windows of the input.
      batch: For each axis that weight, input and result share, its axis in the input and in the result; None if each
        row of the input (its first axis) chooses an entry of the axis.
      free: For each other axis of the weight, its axis in the result.
      run: `run(x, array)` is the operation on an input and an array. Parameters of the equation can be changed by
        keyword. If `contracted` or `batch` has None, the array may be of another size along the free axis, and
        along those of `contracted` that are not None.
      groups: Number of groups that the input's contracted axis and the weight's free axis are divided into.
      by_row: With rows that choose: from an array whose first axis is the batch axis, the entry of each row.
      measure: `measure(x, taps)`: the moments of the input, if it has windows or rows that choose.
      description: Of the factored form, for `explain`.
    """

    contracted: Mapping[int, int | None]
    batch: Mapping[int, tuple[int, int] | None]
    free: Mapping[int, int]
    run: Callable[..., jax.Array]
    groups: int = 1
    by_row: Callable[[jax.Array], jax.Array] | None = None
    measure: Callable[[jax.Array, Sequence[Factor]], Moments] | None = None
    description: str = "x·W + (x·a)·b"

    @property
    def has_labels(self) -> bool:
        """Whether every axis that input and weight share is one axis of each, so that any chain of products will do."""
        return None not in self.contracted.values() and None not in self.batch.values() and self.groups == 1


class Axes:
    """The labels of the axes of the input and the result of a contraction."""

    def __init__(self, weight: Weight, x: jax.Array, operation: Contraction, groups: Pairs):
        self.operation, self.weight, self.groups = operation, weight, groups
        dims = weight.dims
        self.summed = [pair for axis in operation.contracted for pair in dims[axis]]
        self.batch = [pair for axis in operation.batch for pair in dims[axis]]
        self.free = [pair for axis in operation.free for pair in dims[axis]]
        # Each row of the input chooses an entry of these.
        self.chosen = [pair for axis, at in operation.batch.items() if at is None for pair in dims[axis]]
        self.roles = dict.fromkeys((label for label, _ in self.free), "out")
        self.roles |= dict.fromkeys((label for label, _ in groups[: len(self.free) - 1]), "batch")
        self.roles |= dict.fromkeys((label for label, _ in self.summed), "in")
        self.roles |= dict.fromkeys((label for label, _ in self.batch), "batch")
        by_axis = {at: [*groups, *dims[axis]] for axis, at in operation.contracted.items() if at is not None}
        by_axis |= {at[0]: dims[axis] for axis, at in operation.batch.items() if at is not None}
        self.token_axes = [axis for axis in range(x.ndim) if axis not in by_axis]
        by_axis |= {axis: [(f"{TOKENS}{i}", x.shape[axis])] for i, axis in enumerate(self.token_axes)}
        self.x_dims: list[Pairs] = [by_axis[axis] for axis in range(x.ndim)]
        self.x = [pair for pairs in self.x_dims for pair in pairs]

    def out(self, base: jax.Array) -> list[Pairs]:
        """The labels of each axis of the result."""
        dims, operation = self.weight.dims, self.operation
        by_axis = {at: dims[axis] for axis, at in operation.free.items()}
        by_axis |= {at[1]: dims[axis] for axis, at in operation.batch.items() if at is not None}
        rest = [axis for axis in range(base.ndim) if axis not in by_axis]
        by_axis |= {axis: [(f"{TOKENS}{i}", base.shape[axis])] for i, axis in enumerate(rest)}
        return [by_axis[axis] for axis in range(base.ndim)]

    def by_row(self, factor: Factor) -> Factor:
        """A factor with the entry of each row, if it has an axis of which rows choose entries."""
        labels = [label for label, _ in self.chosen if label in factor.labels]
        if not labels or self.operation.by_row is None:
            return factor
        rest = [label for label in factor.labels if label not in labels]
        return Factor(self.operation.by_row(factor.transposed([*labels, *rest]).array), (f"{TOKENS}0", *rest))


def split_gains(weight: Weight, axes: Axes) -> tuple[list[Factor], list[Factor]]:
    """Gains on contracted axes, which scale the input, and gains on the others, which scale the output."""
    scales_output = {label for label, _ in (*axes.batch, *axes.free)}
    scales_input = {label for label, _ in (*axes.x, *axes.chosen)}
    after = [gain for gain in weight.gains if set(gain.labels) <= scales_output]
    before = [gain for gain in weight.gains if not set(gain.labels) <= scales_output]
    if any(not set(gain.labels) <= scales_input for gain in before):
        raise CannotFactor("a gain is on contracted and free axes at once, or on the windows of a convolution")
    return before, after
