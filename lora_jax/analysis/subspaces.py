"""Similarity of subspaces, and the amplification of a weight in the directions of its change."""

import dataclasses
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import IN
from lora_jax.analysis.decomposition import (
    Axes,
    Decomposition,
    Delta,
    decompose_adapter,
    get_layout,
    get_weights,
    ratio,
    svd,
    to_float64,
    to_matrices,
)
from lora_jax.leaves import align_leading


@dataclasses.dataclass(frozen=True)
class Amplification:
    """How much a delta amplifies its weight in the delta's own directions. Each field is `[*lead]`.

    Attributes:
      change: ‖ΔW‖_F.
      weight: ‖W‖_F.
      projected: ‖UᵀWVᵀ‖_F with U and V from ΔW.
      largest: The same with as many leading directions of W, the maximum over all directions.
      random: The same with as many random directions, in root mean square.
      scale: The adapter's scale, which ΔW includes: ΔW / scale is the product of the factors.
    """

    change: np.ndarray
    weight: np.ndarray
    projected: np.ndarray
    largest: np.ndarray
    random: np.ndarray
    scale: np.ndarray

    @property
    def factor(self) -> np.ndarray:
        """‖ΔW‖_F / ‖UᵀWVᵀ‖_F, with the scale included in ΔW."""
        return ratio(self.change, self.projected, np.nan)

    @property
    def unscaled_factor(self) -> np.ndarray:
        """The same for the product of the factors, without the scale."""
        return ratio(self.change, self.projected * self.scale, np.nan)


def factor_directions(delta: Delta) -> dict[str, np.ndarray]:
    """Returns the right-singular vectors of every factor `a`, in descending order of singular values.

    They span the same space as `decompose(delta)[path].inputs`, ordered by `a` alone. The LoRA paper compares runs by
    these directions.

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
            raise ValueError(f"{path!r}: the {node.kind} adapter has no factor a; decompose() supports every adapter.")
        rows = to_float64(a).reshape(*a.shape[: a.ndim - node.axes.count(IN)], -1)
        directions[path] = svd(rows.swapaxes(-1, -2)).inputs
    return directions


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    r"""Computes φ(i, j) between the first i directions of one matrix and the first j of another, for all i and j.

    .. math:: \phi(A, B, i, j) = \frac{\lVert U_A^{i\top} U_B^j \rVert_F^2}{\min(i, j)}

    φ is 1 if one of the two subspaces contains the other, and 0 if they are orthogonal.

    Args:
      one: `[*lead, n, k]`, orthonormal columns, such as `factor_directions(delta)[path]`, or the inputs of a
        :class:`Decomposition` of a ΔW or a weight.
      other: `[*lead, n, l]`.

    Returns:
      `[*lead, k, l]`; element (0, 0) compares the first direction of each.

    Raises:
      ValueError: The directions are in spaces of different sizes.

    Example:
      >>> import numpy as np
      >>> similarity(np.eye(3)[:, :2], np.eye(3)[:, 1:]).tolist()
      [[0.0, 0.0], [1.0, 0.5]]

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §7.2, Eq. 4
    """
    if one.shape[-2] != other.shape[-2]:
        raise ValueError(
            f"similarity: the directions are in spaces of different sizes, {one.shape[-2]} and {other.shape[-2]}."
        )
    squares = np.square(one.swapaxes(-1, -2) @ other)
    counts = np.minimum.outer(np.arange(1, squares.shape[-2] + 1), np.arange(1, squares.shape[-1] + 1))
    return squares.cumsum(axis=-2).cumsum(axis=-1) / counts


def amplification(
    delta: Delta, base: Any, *, rank: int | None = None, axes: Axes | None = None
) -> dict[str, Amplification]:
    r"""Computes how much each ΔW amplifies its weight in the directions of ΔW.

    .. math:: \lVert \Delta W \rVert_F \,/\, \lVert U^\top W V^\top \rVert_F

    U and V are the directions of ΔW, which W is projected onto.

    Args:
      delta: Adapters.
      base: The parameters.
      rank: The number of leading directions, which ΔW is truncated to; None uses all of them (for a ΔW of full rank
        they span the whole space).
      axes: `{path: roles}` for adapters without axis roles (`Full`).

    Returns:
      `{path: Amplification}`; a factor is NaN if ΔW is zero.

    Raises:
      ValueError: As :func:`decompose`.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": 0.5 * jnp.eye(3)}
      >>> node = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, alpha=2, axes=("in", "out"))})["w"]
      >>> delta = {"w": dataclasses.replace(node, a=jnp.eye(3)[:1], b=jnp.eye(3)[:1])}
      >>> result = amplification(delta, base)["w"]
      >>> float(result.factor), float(result.unscaled_factor)
      (4.0, 2.0)

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §7.3, Table 7
    """
    weights, results = get_weights(delta, base), {}
    for path, node in delta.items():
        change = decompose_adapter(path, node, weights[path], axes)
        weight = to_matrices(weights[path], *get_layout(path, node, axes))
        change = Decomposition(change.inputs[..., :rank], change.values[..., :rank], change.outputs[..., :rank])
        count = np.count_nonzero(change.values, axis=-1)
        values = np.linalg.svd(weight, compute_uv=False)
        total = np.linalg.norm(weight, axis=(-2, -1))
        leading = np.arange(values.shape[-1]) < count[..., None]
        scale = to_float64(getattr(node, "scale", np.ones(())))
        results[path] = Amplification(
            change=np.linalg.norm(change.values, axis=-1),
            weight=total,
            projected=np.linalg.norm(change.inputs.swapaxes(-1, -2) @ weight @ change.outputs, axis=(-2, -1)),
            largest=np.linalg.norm(values * leading, axis=-1),
            random=total * count / np.sqrt(weight.shape[-2] * weight.shape[-1]),
            scale=np.broadcast_to(align_leading(scale, count.ndim), count.shape),
        )
    return results
