"""Checks of arguments. Errors name the function, the argument and its value."""

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
        raise TypeError(f"{owner}: expected a path as directory, got {type(value).__name__}.")


def key(owner: str, value: Any) -> None:
    """Raises an error unless `value` is one PRNG key, from `jax.random.key` or `jax.random.PRNGKey`.

    Raises:
      TypeError: `value` is not a key.
      ValueError: `value` is an array of keys.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    typed = dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or not shape):
        what = short(value) if dtype is not None else type(value).__name__
        raise TypeError(f"{owner}: expected a PRNG key, such as jax.random.key(0); got {what}.")
    if len(shape) > (0 if typed else 1):
        raise ValueError(f"{owner}: expected one PRNG key; got an array of keys, {short(value)}.")


def positive(owner: str, name: str, value: int) -> None:
    """Raises `ValueError` unless `value` is a positive integer."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{owner}({name}={value!r}): expected a positive integer.")


def integer(owner: str, name: str, value: int) -> int:
    """Returns an integer, or a concrete scalar array of one, as a Python integer; raises `ValueError` for others."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        value = value.item()
    if not _is_integer(value):
        raise ValueError(f"{owner}({name}={value!r}): expected an integer.")
    return int(value)


def finite(owner: str, name: str, value: float, *, nonzero: bool = False) -> None:
    """Raises an error unless `value` is a real number that float32 can represent.

    Args:
      owner: The function or recipe, for the message.
      name: The argument, for the message.
      value: A Python or NumPy number, or a scalar array. A tracer is not checked.
      nonzero: Whether zero, or a number that float32 rounds to zero, is an error, because it is a factor of trained
        parameters, which would never train.

    Raises:
      TypeError: `value` is not a real number.
      ValueError: `value` is NaN, infinite or too large for float32, or it is zero and `nonzero` is true.
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
    """Raises an error unless `alpha` is None or a number whose scale float32 can represent."""
    if alpha is None or isinstance(alpha, jax.core.Tracer):
        return
    finite(owner, "alpha", alpha, nonzero=True)
    if problem := unusable(scale(), nonzero=True):
        raise ValueError(f"{owner}(alpha={alpha!r}): the scale {scale()!r} {problem}.")


def unusable(value: Any, nonzero: bool) -> str | None:
    """Returns why float32 cannot represent a number, as the end of a sentence, or None."""
    limits = np.finfo(np.float32)
    if not abs(value) <= float(limits.max):  # NaN is not below anything
        return "is not a finite float32"
    if nonzero and abs(value) < float(limits.tiny):
        return f"is {'' if value == 0 else 'rounded to '}zero, so that the adapter would do nothing and never train"
    return None


def rate(owner: str, name: str, value: float) -> None:
    """Raises an error unless `value` is a dropout rate, also after rounding to float32."""
    finite(owner, name, value)
    if not isinstance(value, jax.core.Tracer) and not 0.0 <= np.float32(value) < 1.0:
        raise ValueError(f"{owner}({name}={value}): expected a rate of at least 0 and below 1.")


def flag(owner: str, name: str, value: bool) -> None:
    """Raises `ValueError` unless `value` is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}({name}={value!r}): expected True or False.")


def floating(owner: str, dtype: jax.typing.DTypeLike, kind: Any = jnp.floating) -> None:
    """Raises `ValueError` unless `dtype` is a floating-point dtype (or a subtype of `kind`)."""
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), kind)
    except TypeError:
        raise ValueError(f"{owner}(dtype={dtype!r}): expected a floating-point dtype, such as jnp.float32.") from None
    if not is_floating:
        raise ValueError(f"{owner}(dtype={jnp.dtype(dtype).name}): expected a floating-point dtype.")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def blocks(owner: str, value: int | Sequence[bool]) -> None:
    """Raises `ValueError` unless `value` is a positive integer or a sequence of booleans, one of which is true."""
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
