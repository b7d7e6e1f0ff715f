"""check_finite(): checks the loss, the weight and the gradients in the metrics of a step."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises an error if the loss or gradients of a step are not finite. Waits for the step to finish.

    Args:
      metrics: The metrics of a step of :func:`lora_jax.train_step` or :func:`lora_jax.train_many`.

    Raises:
      FloatingPointError: A loss weight is negative or not finite, or the loss or gradients are not finite. The message
        lists every path whose gradient has NaN or infinite elements with their number, for each member of many.

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
    """A count in words, or one for each member with a nonzero count."""
    if not counts.ndim:
        return f"{counts} {what}"
    return ", ".join(f"member {member}: {counts[member]} {what}" for member in np.flatnonzero(counts))
