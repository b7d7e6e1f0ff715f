"""Whether calls of adapted functions are given a dropout key, for the warning of a training step."""

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
def recorded() -> Iterator[list[bool]]:
    """A list that gets an entry for each call of an adapted function in the block: whether it has a dropout key."""
    calls: list[bool] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def note(has_key: bool) -> None:
    """Records a call of an adapted function."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append(has_key)


def recording(loss_fn: Callable, calls: list[bool]) -> Callable:
    """The loss function; when it is traced, `calls` gets whether each adapted call in it has a dropout key."""

    @functools.wraps(loss_fn)
    def recorded_loss(*args):
        with recorded() as seen:
            out = loss_fn(*args)
        calls.extend(seen)
        return out

    return recorded_loss


def warn_without_key(calls: list[bool], delta: Mapping[str, Any]) -> None:
    """Warns if a delta has dropout and none of the calls that a trace recorded has a key; empties the record."""
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
            stacklevel=4,
        )


def _dropout_rates(delta: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """The paths whose adapters have dropout, with the largest rate."""
    for path, node in delta.items():
        rate = getattr(node, "dropout", None)
        if isinstance(rate, jax.Array | np.ndarray) and not isinstance(rate, jax.core.Tracer):
            parts = [part.data for part in rate.addressable_shards] if isinstance(rate, jax.Array) else [rate]
            largest = max(float(np.max(np.asarray(part))) for part in parts)  # on the host, whatever mesh is current
            if largest > 0:
                yield path, largest
