"""adapt(): a function of parameters becomes a function of base and delta."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax

from lora_jax.adapters.protocol import Adapter
from lora_jax.transform import jaxprs
from lora_jax.transform.call import Arguments, Call, check_delta, entered
from lora_jax.transform.interpreter import Interpreter

CACHED_CALLS = 128
"""Traces that one adapted function keeps; the oldest goes when another shape or static argument comes."""


def adapt(fn: Callable, *, flatten: bool = True) -> Callable:
    r"""Makes a function of parameters a function of frozen parameters and adapters.

    Where a weight is multiplied with an input, :math:`x W + s\,(x A^\top) B` is computed; the merged
    weight and its gradient are never formed. The function is traced, not rewritten: Linen, NNX,
    Equinox, Haiku and plain functions are all the same to it. :func:`lora_jax.explain` tells how each
    weight is treated.

    Args:
      fn: `fn(base, *args, **kwargs)`, anything that `jax.jit` can trace. Array leaves of its arguments
        are traced; everything else (strings, flags, callables) is closed over, and outputs that are no
        arrays pass through. As under `jax.jit`, what it closes over is read when it is traced.
      flatten: Whether the low-rank products see all token axes of their input as one, which is faster.
        False where a later token axis is sharded (sequence parallelism): flattening would gather it. On meshes with
        explicit axes types tell so, and such axes are left apart.

    Returns:
      `adapted(base, delta, /, *args, dropout_key=None, **kwargs)`. It composes with `jit`, `grad`,
      `vmap` (over adapters too), `scan`, `remat`, `shard_map`. `dropout_key` turns the adapters'
      dropout on.

    Raises:
      ValueError: (from `adapted`) The delta names a path that the base lacks, fits another shape, or
        adapts a weight that the function never uses.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: jnp.tanh(x @ base["w"])
      >>> base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(rank=2)}, fn, x)
      >>> adapted = lora.adapt(fn)
      >>> bool((adapted(base, delta, x) == fn(base, x)).all())
      True

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1
    """
    if "dropout_key" in _parameters(fn):
        raise ValueError("The function has an argument dropout_key, a name that adapted() takes for the adapters.")
    calls: dict[Any, tuple[Call, Interpreter]] = {}

    def traced(arguments: Arguments) -> tuple[Call, Interpreter]:
        key = arguments.key()
        if key is not None and key in calls:
            return calls[key]
        made = Call.trace(fn, arguments), Interpreter(flatten=flatten)
        if key is not None and not made[0].program.holds_tracers:
            if len(calls) == CACHED_CALLS:
                del calls[next(iter(calls))]
            calls[key] = made
        return made

    @functools.wraps(fn)
    def adapted(base: Any, delta: dict[str, Adapter], /, *args, dropout_key: jax.Array | None = None, **kwargs) -> Any:
        arguments = Arguments.of(base, args, kwargs)
        check_delta(delta, arguments)
        arguments = dataclasses.replace(arguments, arrays=tuple(jaxprs.varying_together(arguments.arrays, delta)))
        call, interpreter = traced(arguments)
        for path in delta:
            if not call.uses_path(path):
                raise ValueError(f"The delta adapts {path!r}, which the function never uses.")
        return call.evaluate(interpreter, entered(delta, arguments, dropout_key, interpreter))

    return adapted


def _parameters(fn: Callable) -> Collection[str]:
    """The names of a function's parameters, as far as they can be told."""
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return ()
