"""The axes of a weight by their roles: sizes, and what recipes require."""

import math
from collections.abc import Sequence

from lora_jax.adapters.layouts import IN, LOOKUP, OUT
from lora_jax.adapters.protocol import check_axes


def contracted(axes: Sequence[str]) -> tuple[str, ...]:
    """The roles with indexed axes as in axes, which is how adapters store them."""
    return tuple(IN if role == LOOKUP else role for role in axes)


def sizes(shape: Sequence[int], axes: Sequence[str], role: str) -> tuple[int, ...]:
    """The sizes of the axes of one role."""
    return tuple(size for size, axis_role in zip(shape, axes) if axis_role == role)


def in_and_out(name: str, axes: Sequence[str], shape: Sequence[int]) -> tuple[str, ...]:
    """The roles as adapters store them.

    Args:
      name: The recipe's name, for the message.
      axes: The role of each axis.
      shape: The weight's shape.

    Raises:
      ValueError: The roles do not fit the shape, or there is no in or no out axis.
    """
    check_axes(axes, shape)
    roles = contracted(axes)
    for role in (IN, OUT):
        if role not in roles:
            raise ValueError(
                f"{name} needs an in and an out axis; the weight of shape {tuple(shape)} has the roles {tuple(axes)}, "
                f"no {role!r} axis. Full() trains such a leaf in full."
            )
    return roles


def check_rank(name: str, rank: int, shape: Sequence[int], axes: Sequence[str], blocks: int = 1) -> None:
    """Raises `ValueError` if a rank exceeds that of a weight, or that of each of the equal blocks of its out axis."""
    limit = min(math.prod(sizes(shape, axes, IN)), math.prod(sizes(shape, axes, OUT)) // blocks)
    if rank > limit:
        raise ValueError(
            f"{name}(rank={rank}) is above the rank of the weight: shape {tuple(shape)} with roles {tuple(axes)} is "
            f"at most of rank {limit}."
        )


def largest(shape: Sequence[int], axes: Sequence[str], role: str) -> int:
    """The index of the largest axis with a role, the last of equal ones."""
    return max((size, axis) for axis, (size, axis_role) in enumerate(zip(shape, axes)) if axis_role == role)[1]


def divided(name: str, argument: str, part: int, shape: Sequence[int], axis: int) -> int:
    """The number of parts of a size in an axis of a weight.

    Raises:
      ValueError: The size does not divide the axis; the message has the nearest ones that do.
    """
    count, rest = divmod(shape[axis], part)
    if rest or not count:
        divisors = [size for size in range(2, shape[axis] + 1) if shape[axis] % size == 0]
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - part))[:3])
        raise ValueError(
            f"{name}({argument}={part}) does not divide the in axis {axis} of the weight of shape {tuple(shape)}; "
            f"nearest: {', '.join(map(str, nearest)) or 'none'}."
        )
    return count


def wrong_split(split: Sequence[int], axes: Sequence[str], roles: Sequence[str]) -> str | None:
    """What is wrong with the indices of divided axes, which have these roles; None if they are right."""
    if tuple(axes[axis] for axis in split if axis < len(axes)) == tuple(roles):
        return None
    expected = " and ".join(f"an {role}" for role in roles)
    return f"split={tuple(split)} does not name {expected} axis of {tuple(axes)}."
