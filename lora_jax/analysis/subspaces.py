"""Directions that two matrices share: φ, and the amplification of a weight in the directions of its change."""

import dataclasses
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import IN
from lora_jax.analysis.decomposition import (
    Axes,
    Decomposition,
    Delta,
    decomposed,
    float64,
    matrices_of,
    ratio,
    reading_of,
    svd,
    weights_of,
)


@dataclasses.dataclass(frozen=True)
class Amplification:
    """How much a delta amplifies what its weight already does in the delta's own directions. `[*lead]` each.

    Attributes:
      change: ‖ΔW‖_F.
      weight: ‖W‖_F.
      projected: ‖UᵀWVᵀ‖_F with U and V from ΔW.
      largest: The same with as many directions from W, which no other directions exceed.
      random: The same with as many random directions, in root mean square.
      scale: What ΔW holds of the adapter's scale: ΔW / scale is the product of the factors.
    """

    change: np.ndarray
    weight: np.ndarray
    projected: np.ndarray
    largest: np.ndarray
    random: np.ndarray
    scale: np.ndarray

    @property
    def factor(self) -> np.ndarray:
        """‖ΔW‖_F / ‖UᵀWVᵀ‖_F, the scale in ΔW."""
        return ratio(self.change, self.projected, np.nan)

    @property
    def unscaled_factor(self) -> np.ndarray:
        """The same for the product of the factors alone."""
        return ratio(self.change, self.projected * self.scale, np.nan)


def factor_directions(delta: Delta) -> dict[str, np.ndarray]:
    """The right-singular vectors of every factor `a`, the largest singular value first.

    They span what ΔW reads, as `decompose(delta)[path].inputs` do, in the order of `a` alone: the LoRA paper compares
    runs by these.

    Returns:
      `{path: [*lead, in, rank]}`.

    Raises:
      ValueError: An adapter has no factor `a` with a row for each rank.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> factor_directions(delta)["w"].shape
      (4, 2)

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §7.2
    """
    directions = {}
    for path, node in delta.items():
        a = getattr(node, "a", None)
        if a is None or node.rank is None:
            raise ValueError(f"{path!r}: the {node.kind} adapter has no factor a; decompose() serves every adapter.")
        rows = float64(a).reshape(*a.shape[: a.ndim - node.axes.count(IN)], -1)
        directions[path] = svd(rows.swapaxes(-1, -2)).inputs
    return directions


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    r"""φ(i, j) between the first i directions of one matrix and the first j of another, for all i and j at once.

    .. math:: \phi(A, B, i, j) = \frac{\lVert U_A^{i\top} U_B^j \rVert_F^2}{\min(i, j)}

    It is 1 where one of the two subspaces holds the other, 0 where they are orthogonal.

    Args:
      one: `[*lead, n, k]`, orthonormal columns, such as `factor_directions(delta)[path]`, or the inputs of a
        :class:`Decomposition` of a ΔW or a weight.
      other: `[*lead, n, l]`.

    Returns:
      `[*lead, k, l]`; element (0, 0) compares the first direction of each.

    Raises:
      ValueError: The directions are of spaces of different sizes.

    Example:
      >>> import numpy as np
      >>> similarity(np.eye(3)[:, :2], np.eye(3)[:, 1:]).tolist()
      [[0.0, 0.0], [1.0, 0.5]]

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §7.2, Eq. 4
    """
    if one.shape[-2] != other.shape[-2]:
        raise ValueError(
            f"similarity: the directions are of spaces of different sizes, {one.shape[-2]} and {other.shape[-2]}."
        )
    squares = np.square(one.swapaxes(-1, -2) @ other)
    counts = np.minimum.outer(np.arange(1, squares.shape[-2] + 1), np.arange(1, squares.shape[-1] + 1))
    return squares.cumsum(axis=-2).cumsum(axis=-1) / counts


def amplification(
    delta: Delta, base: Any, *, rank: int | None = None, axes: Axes | None = None
) -> dict[str, Amplification]:
    r"""How much each ΔW amplifies its weight in its own directions.

    .. math:: \lVert \Delta W \rVert_F \,/\, \lVert U^\top W V^\top \rVert_F

    U and V are the directions of ΔW; W is cut down to them.

    Args:
      delta: Adapters.
      base: The parameters.
      rank: How many directions, those of the largest values, with ΔW cut to them; None takes all (for a ΔW of
        full rank these span everything).
      axes: `{path: roles}` for adapters that know none (`Full`).

    Returns:
      `{path: Amplification}`; a factor is NaN where ΔW is zero.

    Raises:
      ValueError: As :func:`decompose`.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": 0.5 * jnp.eye(3)}
      >>> node = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, alpha=2, axes=("in", "out"))})["w"]
      >>> delta = {"w": dataclasses.replace(node, a=jnp.eye(3)[:1], b=jnp.eye(3)[:1])}
      >>> found = amplification(delta, base)["w"]
      >>> float(found.factor), float(found.unscaled_factor)
      (4.0, 2.0)

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §7.3, Table 7
    """
    weights, found = weights_of(delta, base), {}
    for path, node in delta.items():
        change = decomposed(path, node, weights[path], axes)
        weight = matrices_of(weights[path], *reading_of(path, node, axes))
        change = Decomposition(change.inputs[..., :rank], change.values[..., :rank], change.outputs[..., :rank])
        count = np.count_nonzero(change.values, axis=-1)
        own = np.linalg.svd(weight, compute_uv=False)
        total = np.linalg.norm(weight, axis=(-2, -1))
        used = np.arange(own.shape[-1]) < count[..., None]
        scale = float64(getattr(node, "scale", np.ones(())))
        found[path] = Amplification(
            change=np.linalg.norm(change.values, axis=-1),
            weight=total,
            projected=np.linalg.norm(change.inputs.swapaxes(-1, -2) @ weight @ change.outputs, axis=(-2, -1)),
            largest=np.linalg.norm(own * used, axis=-1),
            random=total * count / np.sqrt(weight.shape[-2] * weight.shape[-1]),
            scale=np.broadcast_to(scale.reshape(scale.shape + (1,) * (count.ndim - scale.ndim)), count.shape),
        )
    return found
