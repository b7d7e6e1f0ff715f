"""Riemannian preconditioning: scales the gradient of each low-rank factor by the Gram matrix of the other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax import lax

from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import IN, OUT, is_adapter, is_inexact


def scale_by_riemannian(damping: float = 1e-6) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions the gradients of low-rank factors, so that a step in ΔW does not depend on its factorization.

    .. math::
      g_a \leftarrow (b\,b^\top + \delta I)^{-1} g_a, \qquad g_b \leftarrow (a\,a^\top + \delta I)^{-1} g_b

    For :math:`\delta \to 0` the pairs (a, b) and :math:`(G a, G^{-\top} b)`, which have the same product, take steps
    to the same product, to first order in the learning rate. The transform applies to LoRA, LoRA-FA and the factors of
    DoRA; other leaves are not changed. The scale is not part of the metric, as in the paper: with plain gradient
    descent a step in ΔW is proportional to the square of the scale.

    Args:
      damping: δ, positive. Rows that are zero (padding of the rank in a stack) remain zero. The damping is increased
        slightly if a Gram matrix is singular to float32 precision.

    Returns:
      An Optax transform without state, to be chained before the optimizer. `update` needs `params`, and, for a pair of
      which only `b` trains, `frozen=`, the frozen half of the delta (:func:`lora_jax.partition`).

    Raises:
      ValueError: The damping is not positive; (from `init`) there is no low-rank pair; (from `update`) `params` or
        `frozen` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> recipe = lora.LoRA(2, axes=("in", "out"), init="gaussian")
      >>> train, frozen = lora.partition(lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": recipe}))
      >>> tx = optax.chain(scale_by_riemannian(), optax.adam(1e-3))
      >>> updates, state = tx.update(train, tx.init(train), train)
      >>> updates["w"].a.shape
      (2, 4)

    References:
      Zhang and Pilanci, `Riemannian Preconditioned LoRA <https://arxiv.org/abs/2402.02347>`_, 2024, §3
    """
    if not damping > 0.0:
        raise ValueError(f"scale_by_riemannian(damping={damping}): expected a positive number.")

    def init(params):
        if not any(map(_is_pair, jax.tree.leaves(params, is_leaf=is_adapter))):
            raise ValueError("scale_by_riemannian: expected a low-rank pair among the parameters, got none.")
        return optax.EmptyState()

    def update(updates, state, params=None, *, frozen=None, **extra):
        del extra
        if params is None:
            raise ValueError("scale_by_riemannian().update needs params: the other factor is the preconditioner.")

        def precondition(keys, gradient, node, frozen_node=None):
            if not _is_pair(node):
                return gradient
            a, b = node.a, node.b
            if not is_inexact(a):
                if frozen_node is None:
                    raise ValueError(
                        f"scale_by_riemannian: {jax.tree_util.keystr(keys)} trains only b; pass frozen=, the half of "
                        "the delta that contains a."
                    )
                a = frozen_node.a
            new = {"b": _solve(a, node.axes.count(IN), gradient.b, node.axes.count(OUT), damping)}
            if is_inexact(gradient.a):
                new["a"] = _solve(b, node.axes.count(OUT), gradient.a, node.axes.count(IN), damping)
            return dataclasses.replace(gradient, **new)

        halves = (updates, params) if frozen is None else (updates, params, frozen)
        return jax.tree_util.tree_map_with_path(precondition, *halves, is_leaf=is_adapter), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_pair(node: Any) -> bool:
    """Returns whether a node is a low-rank pair with at least a `b` that is neither frozen nor masked."""
    return isinstance(node, LoRAAdapter) and is_inexact(node.b)


def _solve(factor: jax.Array, count: int, gradient: jax.Array, other_count: int, damping: float) -> jax.Array:
    """Returns (factor · factorᵀ + damping · I)⁻¹ gradient; `count` and `other_count` axes follow their rank axes."""
    dtype = compute_dtype(gradient.dtype)
    rows, right = (
        x.astype(dtype).reshape(*x.shape[: x.ndim - axes], -1) for x, axes in ((factor, count), (gradient, other_count))
    )
    gram = jnp.matmul(rows, rows.mT, precision=lax.Precision.HIGHEST)
    # Rounding can make the eigenvalues of a singular Gram matrix negative, by at most rank times eps times trace.
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    shift = damping + gram.shape[-1] * jnp.finfo(dtype).eps * trace
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=dtype), gram.shape)
    solved = jsp.linalg.cho_solve((jnp.linalg.cholesky(gram + shift * identity), True), right)
    return solved.reshape(gradient.shape).astype(gradient.dtype)
