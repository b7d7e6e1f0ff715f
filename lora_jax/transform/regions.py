"""Functions that the compiler treats as one unit: their intermediate values exist only while they run.

XLA for CPUs hoists computations that do not depend on a loop out of it, and schedules independent computations early.
In an unrolled model with quantized weights, all dequantized weights then exist at the same time. Optimization barriers
do not prevent this, because the CPU compiler removes them first. The branch of a conditional is compiled as a unit,
with the function's operands as its operands. The conditional's predicate is always true, but the compiler cannot prove
it, because it is the result of a loop. The predicate depends on no operand, so `vmap` does not batch it.

On other platforms the function is only wrapped in `jax.checkpoint`: their compilers do not hoist values that are larger
than the operands they are computed from. The same applies to CPU programs that the compiler partitions over a mesh,
where a conditional would prevent it from adding two products before reducing them over devices. Inside `shard_map`
every device has its own program, and the conditional is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.transform import jaxprs


def region(function: Callable[..., jax.Array], *operands: Any, linear: int = 0) -> jax.Array:
    """Computes `function(*operands)`, compiled as one unit.

    The derivatives are regions too. They recompute intermediate values, and their only residuals are operands. If the
    function is differentiated only with respect to operands that it is linear in, the residuals are the other operands.

    Args:
      function: Returns one array. It must not close over traced arrays.
      *operands: Pytrees of arrays.
      linear: The number of leading operands that the function is jointly linear in. Each of them is an array.

    Example:
      >>> double = lambda x: region(lambda x: 2.0 * x, x, linear=1)
      >>> float(double(3.0)), float(jax.grad(double)(3.0))
      (6.0, 2.0)
    """
    leaves, treedef = jax.tree.flatten(operands)
    leaves = jaxprs.varying_together(leaves, leaves)
    program, constants = jaxprs.lift_constants(lambda *leaves: [function(*treedef.unflatten(leaves))], leaves)

    # Under differentiation, the barriers of `checkpoint` keep the forward and the backward pass apart.
    @jax.checkpoint
    def bind(*operands):
        return region_p.bind(*operands, jaxpr=program, linear=linear)[0]

    return bind(*leaves, *constants)


def _bind(function: Callable[..., Sequence[jax.Array]], operands: Sequence[Any], linear: int) -> list[jax.Array]:
    return region_p.bind(*operands, jaxpr=jax.make_jaxpr(function)(*operands), linear=linear)


def _evaluate(*operands, jaxpr, linear=0):
    del linear
    return jaxprs.as_function(jaxpr)(*operands)


def _evaluate_in_conditional(*operands, jaxpr, linear):
    del linear
    true = lax.fori_loop(0, 2, lambda i, total: total + i, jnp.int32(0)) > 0
    return lax.cond(true, jaxprs.as_function(jaxpr), lambda *_: list(map(jaxprs.zeros, jaxpr.out_avals)), *operands)


def _choose_for_cpu(context: Any) -> Callable:
    return _evaluate_in_conditional if jaxprs.is_for_one_device(context) else _evaluate


def _jvp(primals, tangents, *, jaxpr, linear):
    outs = region_p.bind(*primals, jaxpr=jaxpr, linear=linear)
    nonzero = [index for index, tangent in enumerate(tangents) if not jaxprs.is_symbolic_zero(tangent)]
    if nonzero and nonzero[-1] < linear:
        linear_tangents = map(jaxprs.instantiate, tangents[:linear])
        return outs, region_p.bind(*linear_tangents, *primals[linear:], jaxpr=jaxpr, linear=linear)

    def pushforward(*operands):
        tangents, primals = operands[: len(nonzero)], operands[len(nonzero) :]

        def function(*parts):
            operands = dict(enumerate(primals)) | dict(zip(nonzero, parts))
            return jaxprs.as_function(jaxpr)(*operands.values())

        return jax.jvp(function, [primals[index] for index in nonzero], list(tangents))[1]

    return outs, _bind(pushforward, [*(tangents[index] for index in nonzero), *primals], len(nonzero))


def _transpose(cotangents, *operands, jaxpr, linear):
    indices = [index for index, operand in enumerate(operands) if jaxprs.is_linear_input(operand)]
    avals = [operands[index].aval for index in indices]
    count = len(cotangents)

    def backward(*operands):
        def forward(*parts):
            inputs = [jaxprs.zeros(aval) for aval in jaxpr.in_avals[:linear]]
            for index, part in zip(indices, parts):
                inputs[index] = part
            return jaxprs.as_function(jaxpr)(*inputs, *operands[count:])

        return jax.linear_transpose(forward, *avals)(list(operands[:count]))

    results = _bind(backward, [*map(jaxprs.instantiate, cotangents), *operands[linear:]], count)
    by_index = dict(zip(indices, results))
    return [by_index.get(index) for index in range(len(operands))]


def _batch(operands, axes, *, jaxpr, linear):
    outs = _bind(jax.vmap(jaxprs.as_function(jaxpr), in_axes=tuple(axes)), operands, linear)
    return outs, [0] * len(outs)


region_p = jaxprs.define_primitive(
    "lora_region",
    _evaluate,
    abstract_eval=lambda *_, jaxpr, linear: jaxpr.out_avals,
    jvp=_jvp,
    transpose=_transpose,
    batch=_batch,
    multiple_results=True,
    lower={"cpu": _choose_for_cpu},
)
