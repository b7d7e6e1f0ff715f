"""Functions of parameters that hold virtual tokens beside the weights of a model."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.models.virtual import Virtual


def adapt(apply_fn: Callable, name: str, read: Callable[[Any], Virtual]) -> Callable:
    """Returns a function like `apply_fn` whose parameters have one more entry, from which virtual tokens are read.

    Args:
      apply_fn: From `lora.nnx.functional(model)`, where the model takes `virtual`; see
        :class:`experiments.models.virtual.Virtual`.
      name: The name of the entry.
      read: Returns the virtual tokens of an entry.

    Returns:
      `apply(params, *args, **kwargs)`, with the arguments of `apply_fn` other than `virtual`.

    Raises:
      ValueError: (from `apply`) The parameters have no such entry, or virtual tokens of two forms.
    """

    @functools.wraps(apply_fn)
    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        if name not in params:
            entries = ", ".join(map(repr, params))
            raise ValueError(
                f"The parameters have no {name!r} but {entries}; add it to the base: base | {{{name!r}: …}}."
            )
        if "virtual" in kwargs:
            raise ValueError(f"The parameters have {name!r} and virtual tokens of another form; expected one form.")
        weights = {key: value for key, value in params.items() if key != name}
        cache = kwargs.get("cache")
        if cache is not None and cache.virtual:
            # The cache holds what the entry computes. `lora.adapt` refuses adapters on which no output depends, so the
            # dependence is stated.
            used, _ = jax.lax.optimization_barrier((cache.used, params[name]))
            kwargs["cache"] = dataclasses.replace(cache, used=used)
        return apply_fn(weights, *args, virtual=read(params[name]), **kwargs)

    return apply
