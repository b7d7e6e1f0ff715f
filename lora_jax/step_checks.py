"""Checks of the arguments of a training step."""

import contextlib
import dataclasses
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


def check_lowered(state: Any, batch: Any, called_state: Any, called_batch: Any, *, same_static: bool) -> None:
    """Raises `TypeError` unless a compiled step is called with trees of the structures that it was lowered for.

    Args:
      state: The state that the step was lowered for, with anything as leaves.
      batch: Its batch.
      called_state: The argument of the compiled step.
      called_batch: Its other argument.
      same_static: Whether static leaves of the base, and which leaves are trained, are the same.
    """
    names = [field.name for field in dataclasses.fields(state)]
    pairs = {f"state.{name}": (getattr(state, name), getattr(called_state, name)) for name in names}
    pairs["batch"] = (batch, called_batch)
    for name, (one, other) in pairs.items():
        expected, got = jax.tree.structure(one), jax.tree.structure(other)
        if expected != got:
            raise TypeError(f"{name}: the compiled step was lowered for the structure {expected}; got {got}.")
    if not same_static:
        raise TypeError(
            "The compiled step was lowered for another state: leaves of its base that are not arrays differ."
        )


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
