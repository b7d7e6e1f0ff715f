"""check_finite(): raises where a step's metrics show a loss, a weight or gradients that are not valid."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises where a step's loss or gradients are not finite; waits for the step to finish.

    Args:
      metrics: From a step made by :func:`train_step` or :func:`lora_jax.train_many`.

    Raises:
      FloatingPointError: A loss weight is negative or not finite, or the loss or gradients are not finite. Names
        every path whose gradient has NaN or infinite elements, with the number, and the members if there are many.

    Example:
      >>> import jax.numpy as jnp
      >>> check_finite({"loss": jnp.float32(1), "nonfinite": {"w": jnp.int32(0)}})
    """
    invalid = np.asarray(metrics.get("invalid_weights", 0))
    if invalid.any():
        raise FloatingPointError(
            f"The weight that loss_fn returned is negative or not finite ({_counted(invalid, 'microbatches')}); "
            f"the total weight is {np.asarray(metrics['weight'])}."
        )
    bad = {path: np.asarray(counts) for path, counts in metrics["nonfinite"].items() if np.any(counts)}
    loss = np.asarray(metrics["loss"])
    if bad:
        named = ", ".join(f"{path} ({_counted(counts, 'elements')})" for path, counts in bad.items())
        raise FloatingPointError(f"Gradients are not finite (loss {loss}): {named}.")
    if not np.isfinite(loss).all():
        raise FloatingPointError(f"The loss is {loss}, though the gradients are finite.")


def _counted(counts: np.ndarray, what: str) -> str:
    """A number of things, or one for each member that has any."""
    if not counts.ndim:
        return f"{counts} {what}"
    return ", ".join(f"member {member}: {counts[member]} {what}" for member in np.flatnonzero(counts))
