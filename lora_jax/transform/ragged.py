"""The ragged product as a primitive that every transformation takes.

JAX's own `ragged_dot_general` has no batching rule for a batched weight and none at all for its
gradients. This one is bilinear, so that both directions of differentiation come from its two
transposes, and under `vmap` it runs one member of the batch after the other.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import jaxprs

GROUPS_BY_MATRIX = "[m,k],[g,k,n]->[m,n]"
OUTER_BY_GROUP = "[m,k],[m,n]->[g,k,n]"

_NUMBERS = {
    GROUPS_BY_MATRIX: lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (1,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    ),
    OUTER_BY_GROUP: lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    ),
}


def ragged_product(x, weight, sizes, precision=None, dtype=None) -> jax.Array:
    """Rows of x, sorted by group, each times its group's matrix.

    Args:
      x: `[m, k]`.
      weight: `[g, k, n]`.
      sizes: `[g]`, integers; how many rows each group has.
      precision: As for `jax.lax.dot_general`.
      dtype: Of the result; the dtype of x where None.

    Returns:
      `[m, n]`.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    x, weight, sizes = jaxprs.varying_together([x, weight, sizes], [x, weight, sizes])
    return ragged_p.bind(x, weight, sizes, form=GROUPS_BY_MATRIX, precision=precision, dtype=dtype)


def ragged_outer(x, y, sizes, precision=None, dtype=None) -> jax.Array:
    """The sum of the outer products of rows, for each group: `[m, k]`, `[m, n]` -> `[g, k, n]`."""
    dtype = jnp.dtype(dtype or x.dtype)
    x, y, sizes = jaxprs.varying_together([x, y, sizes], [x, y, sizes])
    return ragged_p.bind(x, y, sizes, form=OUTER_BY_GROUP, precision=precision, dtype=dtype)


def _evaluate(x, y, sizes, *, form, precision, dtype):
    return lax.ragged_dot_general(x, y, sizes, _NUMBERS[form], precision=precision, preferred_element_type=dtype)


def _shape(x, y, sizes, *, form, precision, dtype):
    del precision
    shape = (x.shape[0], y.shape[2]) if form == GROUPS_BY_MATRIX else (sizes.shape[0], x.shape[1], y.shape[1])
    return jaxprs.varying_like(x, shape, dtype)


def _transpose_left(cotangent, x, y, sizes, *, form, precision, dtype):
    del dtype
    y = y if form == OUTER_BY_GROUP else jnp.swapaxes(y, 1, 2)
    pair = (y, jnp.swapaxes(cotangent, 1, 2)) if form == OUTER_BY_GROUP else (cotangent, y)
    return _bind(*pair, sizes, GROUPS_BY_MATRIX, precision, x.aval.dtype)


def _transpose_right(cotangent, x, y, sizes, *, form, precision, dtype):
    del dtype
    other = OUTER_BY_GROUP if form == GROUPS_BY_MATRIX else GROUPS_BY_MATRIX
    return _bind(x, cotangent, sizes, other, precision, y.aval.dtype)


def _bind(x, y, sizes, form, precision, dtype):
    common = jnp.promote_types(x.dtype, y.dtype)
    return ragged_p.bind(
        x.astype(common), y.astype(common), sizes, form=form, precision=precision, dtype=jnp.dtype(dtype)
    )


def _transpose(cotangent, x, y, sizes, **params):
    if jaxprs.is_symbolic_zero(cotangent):
        return None, None, None
    left = _transpose_left(cotangent, x, y, sizes, **params) if jaxprs.is_linear_input(x) else None
    right = _transpose_right(cotangent, x, y, sizes, **params) if jaxprs.is_linear_input(y) else None
    return left, right, None


def _tangents(primals, tangents, **params):
    x, y, sizes = primals
    dx, dy, _ = tangents
    out = ragged_p.bind(x, y, sizes, **params)
    parts = []
    if not jaxprs.is_symbolic_zero(dx):
        parts.append(ragged_p.bind(dx, y, sizes, **params))
    if not jaxprs.is_symbolic_zero(dy):
        parts.append(ragged_p.bind(x, dy, sizes, **params))
    return out, sum(parts[1:], parts[0])


def _one_by_one(arguments, axes, **params):
    size = next(a.shape[axis] for a, axis in zip(arguments, axes) if axis is not None)
    moved = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arguments, axes)]

    def one(index):
        picked = [
            a if axis is None else lax.dynamic_index_in_dim(a, index, keepdims=False) for a, axis in zip(moved, axes)
        ]
        return ragged_p.bind(*picked, **params)

    return lax.map(one, jnp.arange(size)), 0


ragged_p = jaxprs.define_primitive(
    "lora_ragged_product", _evaluate, abstract_eval=_shape, jvp=_tangents, transpose=_transpose, batch=_one_by_one
)
