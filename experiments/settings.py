"""Checks of settings that several configs share. Each raises a `ValueError` that names the setting."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any


def positive(config: Any, *names: str) -> None:
    """Checks that settings are finite and above zero. None means no limit; the values of a tuple have to differ."""
    for name in names:
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(0 < one < math.inf for one in values):
            raise ValueError(f"{name} must be positive, not {_format(values)}")
        if isinstance(value, tuple) and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{name} must be one or more different numbers, not {_format(values)}")


def not_negative(config: Any, *names: str) -> None:
    """Checks that settings are finite and not below zero. None means no limit; text is not checked."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative or infinite, got {value}")


def fraction(config: Any, *names: str) -> None:
    """Checks that settings are at least 0 and below 1."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be a fraction, at least 0 and below 1, not {getattr(config, name)}")


def lengths(config: Any) -> None:
    """Checks that `lengths` ascend from at least 3: a first and a last special token, and one token between."""
    if not config.lengths or sorted(set(config.lengths)) != list(config.lengths) or config.lengths[0] < 3:
        raise ValueError(f"lengths must be ascending numbers of at least 3, not {_format(config.lengths)}")


def use_fast(config: Any, values: Mapping[str, Any]) -> None:
    """Sets the values of the smallest complete run if `config.fast`, except settings that differ from their default."""
    if not config.fast:
        return
    for field in dataclasses.fields(config):
        if field.name in values and getattr(config, field.name) == field.default:
            object.__setattr__(config, field.name, values[field.name])


def _format(values: Sequence[Any]) -> str:
    return " ".join(map(str, values)) or "nothing"
