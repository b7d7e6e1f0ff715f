"""Records whether adapted functions are called with a dropout key, for a warning of the training step."""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

_CALLS: contextvars.ContextVar[list[bool] | None] = contextvars.ContextVar("calls", default=None)


@contextlib.contextmanager
def record_calls() -> Iterator[list[bool]]:
    """Collects, for each call of an adapted function inside the block, whether it has a dropout key."""
    calls: list[bool] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def record_call(has_key: bool) -> None:
    """Records one call of an adapted function."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append(has_key)


def with_recording(loss_fn: Callable, calls: list[bool]) -> Callable:
    """Wraps a loss function so that tracing it appends to `calls`, for each adapted call, whether it has a key."""

    @functools.wraps(loss_fn)
    def recorded_loss(*args):
        with record_calls() as new_calls:
            out = loss_fn(*args)
        calls.extend(new_calls)
        return out

    return recorded_loss


def warn_without_key(calls: list[bool], delta: Mapping[str, Any]) -> None:
    """Warns if a delta has dropout but none of the recorded calls has a key; then clears the record."""
    if not calls:
        return
    has_key = any(calls)
    calls.clear()
    rates = {} if has_key else dict(_dropout_rates(delta))
    if rates:
        path, rate = next(iter(rates.items()))
        warnings.warn(
            f"{len(rates)} adapters have dropout ({rate:g} at {path!r}), but the loss passes no key, so that dropout "
            "is off: call adapted(base, delta, …, dropout_key=key) in loss_fn(base, delta, batch, key).",
            stacklevel=5,
        )


def _dropout_rates(delta: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Yields the paths of adapters with dropout, each with its largest rate."""
    for path, node in delta.items():
        rate = getattr(node, "dropout", None)
        if isinstance(rate, jax.Array | np.ndarray) and not isinstance(rate, jax.core.Tracer):
            parts = [part.data for part in rate.addressable_shards] if isinstance(rate, jax.Array) else [rate]
            largest = max(float(np.max(np.asarray(part))) for part in parts)  # on the host: independent of the mesh
            if largest > 0:
                yield path, largest
