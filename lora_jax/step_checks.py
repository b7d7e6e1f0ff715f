"""Checks of the arguments of a training step."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def check_state(state: Any, kind: type) -> None:
    """Raises `TypeError` unless the argument of a step is a state of its class."""
    if not isinstance(state, kind):
        raise TypeError(f"step(state, batch): expected a {kind.__name__} as state; got {type(state).__name__}.")


@contextlib.contextmanager
def explain_donation(state: Any, *, check: bool = False) -> Iterator[None]:
    """Explains errors of JAX about the deleted buffers of a state, which were donated to an earlier step.

    Args:
      state: The argument of the step.
      check: Whether to check the buffers first, because pmap crashes on deleted ones.
    """
    try:
        if check and any(map(_is_deleted, jax.tree.leaves(state))):
            raise RuntimeError("a buffer of the state was donated")
        yield
    except (RuntimeError, ValueError) as error:
        if not re.search("deleted|donated", str(error)) or not any(map(_is_deleted, jax.tree.leaves(state))):
            raise
        raise RuntimeError(
            "The buffers of this state were donated to an earlier step. Use the state that the step returned, or "
            "create the step with donate=False to use a state more than once."
        ) from error


def _is_deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def check_batch(batch: Any, accumulate: int, devices: int = 1) -> None:
    """Raises `ValueError` unless every leaf of a batch can be divided into microbatches and over devices."""
    parts = accumulate * devices
    if parts == 1:
        return
    for leaf in jax.tree.leaves(batch):
        if not jnp.ndim(leaf) or leaf.shape[0] % parts:
            raise ValueError(
                f"A leaf of the batch has shape {jnp.shape(leaf)}; its leading size must be a multiple of {parts} "
                f"(accumulate={accumulate} × {devices} devices)."
            )
