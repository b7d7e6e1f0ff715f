"""Checks of the arguments that recipes have in common."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.protocol import IN, OUT
from lora_jax.adapters.roles import sizes


def positive(recipe: str, name: str, value: int) -> None:
    """Raises `ValueError` unless `value` is a positive integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{recipe}({name}={value!r}): the {name} is a positive integer.")


def rate(recipe: str, name: str, value: float) -> None:
    """Raises `ValueError` unless `value` is a dropout rate."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{recipe}({name}={value}): a rate is at least 0 and below 1.")


def floating(recipe: str, dtype: jax.typing.DTypeLike) -> None:
    """Raises `ValueError` unless `dtype` is one of floats."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{recipe}(dtype={jnp.dtype(dtype).name}): adapters are floats.")


def one_of(recipe: str, name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is known."""
    if value not in known:
        raise ValueError(f"{recipe}({name}={value!r}): expected one of {', '.join(map(repr, known))}.")


def rank_of(recipe: str, rank: int, shape: Sequence[int], axes: Sequence[str]) -> None:
    """Raises `ValueError` where a rank is above that of a weight."""
    limit = min(math.prod(sizes(shape, axes, role)) for role in (IN, OUT))
    if rank > limit:
        raise ValueError(
            f"{recipe}(rank={rank}) is above the rank of the weight: shape {tuple(shape)} with roles {tuple(axes)} is "
            f"at most of rank {limit}."
        )
