"""How far training has moved each weight's vectors: their direction, their magnitude, and how the two go together."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from lora_jax.adapters.conversion import without_bias
from lora_jax.analysis.decomposition import Axes, Delta, matrices_of, ratio, reading_of, weights_of, wide


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far a weight's vectors (one for each output) have moved, in the mean over them. `[*lead]` each.

    Attributes:
      magnitude: ΔM, the mean of | ‖w'‖ − ‖w‖ |.
      direction: ΔD, the mean of 1 − cos(w', w). A vector of zeros has no direction and counts as unmoved.
    """

    magnitude: np.ndarray
    direction: np.ndarray


def drift(delta: Delta, base: Any, *, axes: Axes | None = None) -> dict[str, Drift]:
    """How far each adapted weight has moved in direction and in magnitude.

    Args:
      delta: Adapters: LoRA, DoRA, full fine-tuning (`Full`), any.
      base: The parameters that they adapt.
      axes: `{path: roles}` for adapters that know none (`Full`).

    Returns:
      `{path: Drift}`.

    Raises:
      ValueError: As :func:`decompose`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> delta = lora.init(jax.random.key(0), {"w": 2 * base["w"]}, {"w": lora.Full()})
      >>> moved = drift(delta, base, axes={"w": ("in", "out")})["w"]
      >>> float(moved.magnitude), float(moved.direction)
      (2.0, 0.0)

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §3.2, Eqs. 3–4
    """
    weights, found = weights_of(delta, base), {}
    for path, node in delta.items():
        reading = reading_of(path, node, axes)
        merged = without_bias(node).merge(wide(weights[path]))
        before, after = (matrices_of(weight, *reading) for weight in (weights[path], merged))
        norms = [np.linalg.norm(matrix, axis=-2) for matrix in (before, after)]
        cosine = ratio(np.sum(before * after, axis=-2), norms[0] * norms[1], 1.0)
        found[path] = Drift(
            magnitude=np.mean(np.abs(norms[1] - norms[0]), axis=-1), direction=np.mean(1.0 - cosine, axis=-1)
        )
    return found


def correlation(drifts: Iterable[Drift]) -> float:
    """Pearson's correlation of ΔD and ΔM over everything in several drifts: paths, layers, steps of a training.

    Raises:
      ValueError: There are fewer than two points, or all have one ΔD or one ΔM.

    Example:
      >>> import numpy as np
      >>> run = [Drift(np.array([1.0, 2.0]), np.array([0.1, 0.2])), Drift(np.array(3.0), np.array(0.3))]
      >>> round(correlation(run), 6)
      1.0

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §3.2
    """
    points = [(drift.direction.ravel(), drift.magnitude.ravel()) for drift in drifts]
    direction, magnitude = (np.concatenate(values) for values in zip(*points)) if points else (np.zeros(0), np.zeros(0))
    if len(direction) < 2:
        raise ValueError(f"correlation: it takes two points or more, there are {len(direction)}.")
    for name, values in (("directions", direction), ("magnitudes", magnitude)):
        if np.ptp(values) == 0:
            raise ValueError(f"correlation: all {len(values)} changes of {name} are {values[0]:g}.")
    return float(np.corrcoef(direction, magnitude)[0, 1])
