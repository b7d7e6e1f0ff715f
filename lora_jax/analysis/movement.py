"""Changes of direction and magnitude of weight vectors in training, and their correlation."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from lora_jax.adapters.terms import without_bias
from lora_jax.analysis.decomposition import Axes, Delta, get_layout, get_weights, ratio, to_matrices, to_merge_dtype


@dataclasses.dataclass(frozen=True)
class Drift:
    """The mean change of a weight's vectors, one per output. Each field is `[*lead]`.

    Attributes:
      magnitude: ΔM, the mean of abs(‖w'‖ − ‖w‖).
      direction: ΔD, the mean of 1 − cos(w', w), where a zero vector counts as unchanged.
    """

    magnitude: np.ndarray
    direction: np.ndarray


def drift(delta: Delta, base: Any, *, axes: Axes | None = None) -> dict[str, Drift]:
    """Computes how much each adapted weight has changed in direction and in magnitude.

    Args:
      delta: Adapters of any kind.
      base: The parameters.
      axes: `{path: roles}` for adapters without axis roles (`Full`).

    Returns:
      `{path: Drift}`.

    Raises:
      ValueError: As :func:`decompose`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> delta = lora.init(jax.random.key(0), {"w": 2 * base["w"]}, {"w": lora.Full()})
      >>> change = drift(delta, base, axes={"w": ("in", "out")})["w"]
      >>> float(change.magnitude), float(change.direction)
      (2.0, 0.0)

    References:
      Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, §3.2, Eqs. 3–4
    """
    weights, drifts = get_weights(delta, base), {}
    for path, node in delta.items():
        layout = get_layout(path, node, axes)
        merged = without_bias(node).merge(to_merge_dtype(weights[path]))
        before, after = (to_matrices(weight, *layout) for weight in (weights[path], merged))
        norms = [np.linalg.norm(matrix, axis=-2) for matrix in (before, after)]
        cosine = ratio(np.sum(before * after, axis=-2), norms[0] * norms[1], 1.0)
        drifts[path] = Drift(
            magnitude=np.mean(np.abs(norms[1] - norms[0]), axis=-1), direction=np.mean(1.0 - cosine, axis=-1)
        )
    return drifts


def correlation(drifts: Iterable[Drift]) -> float:
    """Computes Pearson's correlation of ΔD and ΔM over several drifts (of paths, layers and training steps).

    Raises:
      ValueError: There are fewer than two points, or all have the same ΔD or the same ΔM.

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
        raise ValueError(f"correlation: expected at least two points, got {len(direction)}.")
    for name, values in (("directions", direction), ("magnitudes", magnitude)):
        if np.ptp(values) == 0:
            raise ValueError(f"correlation: all {len(values)} changes of {name} are {values[0]:g}.")
    return float(np.corrcoef(direction, magnitude)[0, 1])
