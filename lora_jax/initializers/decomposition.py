"""The leading singular triplets of matrices, exact or by random sketches."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.leaves import is_finite

OVERSAMPLING = 10
"""Columns of a sketch beyond the rank (Halko et al., 2011, §1.3: 5 to 10 suffice)."""


def singular_triplets(
    matrices: jax.Array, rank: int, *, niter: int | None = None, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values of each matrix, with their vectors.

    Args:
      matrices: `[batch, m, n]`, at least float32.
      rank: How many; at most the smaller of m and n.
      niter: Subspace iterations of a randomized decomposition, O(m·n·rank) each; None for the exact one,
        O(m·n·min(m, n)).
      key: Draws the sketch.

    Returns:
      u `[batch, rank, m]`, values `[batch, rank]`, v `[batch, rank, n]`: vectors are rows, the largest first.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> u, s, v = singular_triplets(jnp.diag(jnp.asarray([3.0, 2.0, 1.0]))[None], 2)
      >>> s.tolist()
      [[3.0, 2.0]]

    References:
      Halko et al., `Finding structure with randomness <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.4, 5.1
    """
    check_finite(matrices)
    if niter is None:
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    else:
        u, s, vt = _sketched(matrices, key, min(rank + OVERSAMPLING, *matrices.shape[1:]), niter)
    return u[:, :, :rank].mT, s[:, :rank], vt[:, :rank]


def check_finite(matrices: jax.Array) -> None:
    """Raises `ValueError` if a matrix has NaN or Inf, on which LAPACK may not terminate. Tracers are not checked."""
    if not is_finite(matrices):
        raise ValueError("the matrix to decompose has NaN or Inf.")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sketched(matrices, key, size: int, niter: int):
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    sketch = jax.random.normal(key, (matrices.shape[0], matrices.shape[2], size), matrices.dtype)
    basis, _ = jnp.linalg.qr(product(matrices, sketch))

    def iterate(_, basis):
        # An orthogonal basis after each product: powers of the singular values would underflow.
        other, _ = jnp.linalg.qr(product(matrices.mT, basis))
        return jnp.linalg.qr(product(matrices, other))[0]

    basis = lax.fori_loop(0, niter, iterate, basis)
    u, s, vt = jnp.linalg.svd(product(basis.mT, matrices), full_matrices=False)
    return product(basis, u), s, vt
