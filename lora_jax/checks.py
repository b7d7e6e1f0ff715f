"""Checks of arguments: what is wrong with a number is said where it is given, with its name and its value."""

import numbers
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.leaves import short


def path(owner: str, value: str | os.PathLike) -> None:
    """Raises `TypeError` unless `value` is a path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{owner}: the directory is a path; got a {type(value).__name__}.")


def key(owner: str, value: Any) -> None:
    """Raises unless `value` is one PRNG key, of `jax.random.key` or `jax.random.PRNGKey`.

    Raises:
      TypeError: It is no key.
      ValueError: It is an array of keys.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or not shape):
        what = short(value) if dtype is not None else type(value).__name__
        raise TypeError(f"{owner}: the key is a PRNG key, such as jax.random.key(0); got {what}.")
    if len(shape) > (0 if typed else 1):
        raise ValueError(f"{owner}: the key is one PRNG key; got an array of keys, {short(value)}.")


def positive(owner: str, name: str, value: int) -> None:
    """Raises `ValueError` unless `value` is a positive integer."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{owner}({name}={value!r}): the {name} is a positive integer: at least 1.")


def integer(owner: str, name: str, value: int) -> int:
    """The value as a Python integer; raises `ValueError` unless it is one, or a concrete scalar array of integers."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        value = value.item()
    if not _is_integer(value):
        raise ValueError(f"{owner}({name}={value!r}): expected an integer.")
    return int(value)


def finite(owner: str, name: str, value: float, *, nonzero: bool = False) -> None:
    """Raises unless `value` is a real number that float32 can hold.

    Args:
      owner: The function or recipe, for the message.
      name: The argument, likewise.
      value: A Python or NumPy number, or a scalar array. A tracer has no value yet and passes.
      nonzero: Whether it multiplies what is trained: zero, or a number that float32 rounds to zero, trains nothing.

    Raises:
      TypeError: It is no real number.
      ValueError: It is NaN, infinite, too large for float32 or, with `nonzero`, zero there.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}({name}={value!r}): expected a number, got {type(value).__name__}.")
    if problem := unusable(value, nonzero):
        raise ValueError(f"{owner}({name}={value!r}): the {name} {problem}.")


def scaling(owner: str, alpha: float | None, scale: Callable[[], float]) -> None:
    """Raises unless `alpha` is None, or a number that makes a scale which float32 can hold."""
    if alpha is None or isinstance(alpha, jax.core.Tracer):
        return
    finite(owner, "alpha", alpha, nonzero=True)
    if problem := unusable(scale(), nonzero=True):
        raise ValueError(f"{owner}(alpha={alpha!r}): the scale {scale()!r} {problem}.")


def unusable(value: Any, nonzero: bool) -> str | None:
    """What is wrong with a number that float32 cannot hold, as the end of a sentence; None of one that it can."""
    limits = np.finfo(np.float32)
    if not abs(value) <= float(limits.max):  # NaN is not below anything
        return "is not a finite float32"
    if nonzero and abs(value) < float(limits.tiny):
        return f"is {'' if value == 0 else 'rounded to '}zero, so that the adapter would do nothing and never train"
    return None


def rate(owner: str, name: str, value: float) -> None:
    """Raises unless `value` is a dropout rate, as float32 has it too."""
    finite(owner, name, value)
    if not isinstance(value, jax.core.Tracer) and not 0.0 <= np.float32(value) < 1.0:
        raise ValueError(f"{owner}({name}={value}): a rate is at least 0 and below 1.")


def flag(owner: str, name: str, value: bool) -> None:
    """Raises `ValueError` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}({name}={value!r}): expected True or False.")


def floating(owner: str, dtype: jax.typing.DTypeLike, kind: Any = jnp.floating) -> None:
    """Raises `ValueError` unless `dtype` is one of floats (or of another kind)."""
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), kind)
    except TypeError:
        raise ValueError(f"{owner}(dtype={dtype!r}): expected a dtype of floats, such as jnp.float32.") from None
    if not is_floating:
        raise ValueError(f"{owner}(dtype={jnp.dtype(dtype).name}): adapters are floats.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def blocks(owner: str, value: int | Sequence[bool]) -> None:
    """Raises `ValueError` unless `value` is a positive integer, or says of each of several blocks whether it counts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not all(isinstance(block, bool | np.bool_) for block in value):
            raise ValueError(f"{owner}(blocks={value!r}): expected True or False for each block.")
        if not any(value):
            raise ValueError(f"{owner}(blocks={value!r}): no block is adapted.")
    elif not _is_integer(value) or value < 1:
        raise ValueError(f"{owner}(blocks={value!r}): expected a positive integer, or a tuple of booleans.")


def one_of(owner: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{owner}({name}={value!r}): expected one of {', '.join(map(repr, choices))}.")
