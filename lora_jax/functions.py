"""Checks of functions of parameters, which adapt, init, explain and quantize take."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from lora_jax.leaves import short

_MARK = "_lora_adapted"


def mark_adapted(adapted: Callable) -> Callable:
    """Marks a function as a result of `adapt`, for :func:`check_function`."""
    setattr(adapted, _MARK, weakref.ref(adapted))
    return adapted


def check_function(where: str, fn: Any) -> None:
    """Raises `TypeError` unless `fn` can be a function of parameters, `fn(base, *args, **kwargs)`.

    Args:
      where: The name of the called function, for the message.
      fn: The object to check. A result of `adapt`, and a module that holds or creates its own parameters, are errors.
    """
    if not callable(fn):
        what = short(fn) if hasattr(fn, "shape") else type(fn).__name__
        raise TypeError(f"{where} takes a function fn(base, *args, **kwargs); got {what}.")
    if _is_adapted(fn):
        raise TypeError(f"{where} takes the function itself, fn(base, *args, **kwargs); got a result of lora.adapt.")
    name = type(fn).__name__
    if isinstance(fn, linen.Module):
        raise TypeError(f"{where} takes a function fn(base, …); got a Linen module ({name}): pass its apply method.")
    if isinstance(fn, nnx.Module) and jax.tree.leaves(nnx.state(fn, nnx.Param)):
        raise TypeError(
            f"{where} takes a function fn(base, …); got an NNX module ({name}): pass apply_fn, from apply_fn, base = "
            "lora.nnx.functional(model)."
        )


def _is_adapted(fn: Callable) -> bool:
    """Whether `fn` is a result of `adapt`, compiled or not. A function that calls such a result is not."""
    mark = getattr(fn, _MARK, None)
    if mark is None:
        return False
    return mark() is (getattr(fn, "__wrapped__", None) if isinstance(fn, jax.stages.Wrapped) else fn)
