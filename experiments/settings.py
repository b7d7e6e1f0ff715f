"""Checks of settings that configs have in common; each raises `ValueError` with the setting's name."""

import math
from collections.abc import Sequence
from typing import Any


def positive(config: Any, *names: str) -> None:
    """Settings that are finite and above zero; None stands for no limit, several are different."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(0 < one < math.inf for one in values):
            raise ValueError(f"{name} must be positive, not {_shown(values)}")
        if isinstance(value, tuple) and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must be different numbers, one at least, not {_shown(values)}")


def not_negative(config: Any, *names: str) -> None:
    """Settings that are finite and not below zero."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must not be negative, nor infinite, but is {getattr(config, name)}")


def share(config: Any, *names: str) -> None:
    """Settings from 0 to below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is a share, from 0 to below 1, not {getattr(config, name)}")


def lengths(config: Any) -> None:
    """`lengths`, which ascend from 3 or more: a beginning, an end, and a token between."""
    if not config.lengths or sorted(set(config.lengths)) != list(config.lengths) or config.lengths[0] < 3:
        raise ValueError(f"lengths must ascend from 3 or more, not {_shown(config.lengths)}")


def _shown(values: Sequence[Any]) -> str:
    return " ".join(map(str, values)) or "nothing"
