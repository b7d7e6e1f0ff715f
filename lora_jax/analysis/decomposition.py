"""Singular value decompositions of weight changes and of weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter, Delta, check_axes
from lora_jax.adapters.terms import pair
from lora_jax.leaves import dequantized
from lora_jax.transform.call import Arguments, check_delta

Axes = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Singular value decompositions, in descending order of values. Singular vectors of zero values are zero.

    Attributes:
      inputs: `[*lead, in, k]`, the singular vectors in the input space: the right-singular vectors of the (out, in)
        matrices in papers.
      values: `[*lead, k]`, the singular values; their norm is the Frobenius norm of the matrix.
      outputs: `[*lead, out, k]`, the singular vectors in the output space.
    """

    inputs: np.ndarray
    values: np.ndarray
    outputs: np.ndarray


def decompose(delta: Delta, base: Any = None, *, axes: Axes | None = None) -> dict[str, Decomposition]:
    """Computes the singular value decomposition of every ΔW.

    For adapters that add a product of factors (LoRA, AdaLoRA, VeRA, …), a small matrix between the orthogonal parts of
    the factors is decomposed. For all others ΔW is the merged weight minus the base weight.

    Args:
      delta: Adapters.
      base: The parameters; needed for adapters that do not add a product of factors.
      axes: `{path: roles}` for adapters without axis roles (`Full`).

    Returns:
      `{path: Decomposition}`. The norm of the values is ‖ΔW‖_F.

    Raises:
      ValueError: An adapter needs the base, or has no in or no out axes; the delta does not fit the base.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> recipe = lora.LoRA(2, axes=("in", "out"))
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": recipe})
      >>> decompose(delta)["w"].values.tolist()
      [0.0, 0.0]
    """
    weights = get_weights(delta, base)
    return {path: decompose_adapter(path, node, weights.get(path), axes) for path, node in delta.items()}


def decompose_weights(base: Any, delta: Delta, *, axes: Axes | None = None) -> dict[str, Decomposition]:
    """Computes the singular value decomposition of every adapted weight, with the axis roles of its adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.diag(jnp.array([1.0, 3.0]))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, axes=("in", "out"))})
      >>> decompose_weights(base, delta)["w"].values.tolist()
      [3.0, 1.0]
    """
    weights = get_weights(delta, base)
    return {path: svd(to_matrices(weights[path], *get_layout(path, node, axes))) for path, node in delta.items()}


def get_weights(delta: Delta, base: Any) -> dict[str, Any]:
    """Returns the adapted weights by path, or an empty dict without a base."""
    if base is None:
        return {}
    check_delta(delta, Arguments.create(base))
    leaves = paths.flatten(base).as_dict()
    return {path: dequantized(leaves[path]) for path in delta}


def get_layout(path: str, node: Adapter, axes: Axes | None) -> tuple[tuple[str, ...], int]:
    """Returns the roles of a weight's axes, and the number of blocks that its out axis is split into."""
    if node.nonlinear:
        raise ValueError(
            f"{path!r}: the {node.kind} adapter is a nonlinear function of the layer's output and changes no weight; "
            "omit the path."
        )
    roles = tuple((axes or {}).get(path, node.axes))
    if IN not in roles or OUT not in roles:
        raise ValueError(
            f"{path!r}: the {node.kind} adapter has the axis roles {roles}; in and out axes are needed to treat a "
            f"weight of shape {node.shape()} as a matrix. Pass axes={{path: roles}}, or omit the path."
        )
    check_axes(roles, node.shape())
    return roles, len(getattr(node, "blocks", (True,)))


def decompose_adapter(path: str, node: Adapter, weight: Any, axes: Axes | None) -> Decomposition:
    """Computes the decomposition of one ΔW."""
    layout = get_layout(path, node, axes)
    if node.additive:
        factors = pair(node)
        if factors is None:
            return svd(to_matrices(node.merge(jnp.zeros(node.shape(), jnp.float32)), *layout))
        (q_in, r_in), (q_out, r_out) = map(np.linalg.qr, factors.matrices())
        core = svd(r_in @ r_out.swapaxes(-1, -2))
        return Decomposition(q_in @ core.inputs, core.values, q_out @ core.outputs)
    if weight is None:
        raise ValueError(f"{path!r}: ΔW of a {node.kind} adapter depends on the weight; pass base=.")
    return svd(to_matrices(node.merge(to_merge_dtype(weight)), *layout) - to_matrices(weight, *layout))


def svd(matrix: np.ndarray) -> Decomposition:
    """Computes the decomposition of matrices `[*lead, in, out]`."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    zero = s <= s.max(axis=-1, keepdims=True, initial=0.0) * np.finfo(s.dtype).eps * max(matrix.shape[-2:])
    nonzero = ~zero[..., None, :]
    return Decomposition(u * nonzero, np.where(zero, 0.0, s), vt.swapaxes(-1, -2) * nonzero)


def to_matrices(weight: Any, roles: Sequence[str], blocks: int) -> np.ndarray:
    """Returns a weight as `[*batch, (blocks,) in, out]`."""
    groups = [[i for i, role in enumerate(roles) if role == group] for group in (BATCH, IN, OUT)]
    array = to_float64(weight).transpose([i for group in groups for i in group])
    batch, ins = array.shape[: len(groups[0])], array.shape[len(groups[0]) : len(groups[0]) + len(groups[1])]
    matrices = array.reshape(*batch, int(np.prod(ins)), blocks, -1).swapaxes(-2, -3)
    return matrices if blocks > 1 else matrices[..., 0, :, :]


def to_merge_dtype(weight: Any) -> jax.Array:
    """Casts a weight to the dtype that merges are computed in, so that the change is not rounded to its own dtype."""
    return jnp.asarray(weight).astype(compute_dtype(weight.dtype))


def to_float64(array: Any) -> np.ndarray:
    """Returns a float64 array on the host."""
    return np.asarray(array).astype(np.float64)


def ratio(numerator: np.ndarray, denominator: np.ndarray, otherwise: float) -> np.ndarray:
    """Returns the quotient, and `otherwise` where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), otherwise), where=denominator != 0)
