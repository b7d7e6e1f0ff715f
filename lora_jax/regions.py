"""A function that the compiler may not take apart: what it computes on the way exists only while it runs.

XLA for CPUs moves whatever does not depend on a loop out of it, and computes early whatever waits for nothing. Of an
unrolled model with quantized weights, all weights then exist in floats at once. Optimization barriers do not prevent
it: that compiler drops them first. A branch of a conditional stays whole, and its operands are the function's. Its
predicate is true, which the compiler does not find out: it is the result of a loop. It depends on no operand, so that
`vmap` batches nothing more, and no value can reach another.

Elsewhere the function stays as it is, under `jax.checkpoint`: on other platforms, where the compilers hoist nothing
that is larger than its operands, and in programs that the compiler divides over a mesh, where a conditional would keep
it from adding up two products before it sums them over the devices. Inside `shard_map` a device's program is one of its
own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from lora_jax.transform import jaxprs

region_p = Primitive("lora_region")


def region(function: Callable[..., jax.Array], *operands: Any, linear: int = 0) -> jax.Array:
    """`function(*operands)`, compiled as a whole.

    Its derivatives are regions too. They compute anew what they need, and keep nothing but operands: those alone in
    which the function is not linear, where it is differentiated with respect to the others.

    Args:
      function: Returns one array. It closes over no traced arrays.
      *operands: Pytrees of arrays.
      linear: How many operands, the first ones, are arrays that the function is linear in, all together.

    Example:
      >>> double = lambda x: region(lambda x: 2.0 * x, x, linear=1)
      >>> float(double(3.0)), float(jax.grad(double)(3.0))
      (6.0, 2.0)
    """
    leaves, treedef = jax.tree.flatten(operands)
    leaves = jaxprs.varying_together(leaves, leaves)
    program, constants = jaxprs.lifted(lambda *leaves: [function(*treedef.unflatten(leaves))], leaves)

    # Where the function is differentiated, the barriers of `checkpoint` keep its passes apart.
    @jax.checkpoint
    def bound(*operands):
        return region_p.bind(*operands, jaxpr=program, linear=linear)[0]

    return bound(*leaves, *constants)


def _bind(function: Callable[..., Sequence[jax.Array]], operands: Sequence[Any], linear: int) -> list[jax.Array]:
    return region_p.bind(*operands, jaxpr=jax.make_jaxpr(function)(*operands), linear=linear)


def _evaluate(*operands, jaxpr, linear=0):
    del linear
    return jaxpr_as_fun(jaxpr)(*operands)


def _enclosed(*operands, jaxpr, linear):
    del linear
    true = lax.fori_loop(0, 2, lambda i, total: total + i, jnp.int32(0)) > 0
    return lax.cond(true, jaxpr_as_fun(jaxpr), lambda *_: list(map(jaxprs.zeros, jaxpr.out_avals)), *operands)


def _lowered(context, *operands, **params):
    function = _enclosed if jaxprs.is_for_one_device(context) else _evaluate
    return mlir.lower_fun(function, multiple_results=True)(context, *operands, **params)


def _tangents(primals, tangents, *, jaxpr, linear):
    outs = region_p.bind(*primals, jaxpr=jaxpr, linear=linear)
    nonzero = [index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]
    if nonzero and nonzero[-1] < linear:
        changes = [ad.instantiate_zeros(tangent) for tangent in tangents[:linear]]
        return outs, region_p.bind(*changes, *primals[linear:], jaxpr=jaxpr, linear=linear)

    def along(*operands):
        changes, primals = operands[: len(nonzero)], operands[len(nonzero) :]

        def moved(*parts):
            whole = dict(enumerate(primals)) | dict(zip(nonzero, parts))
            return jaxpr_as_fun(jaxpr)(*whole.values())

        return jax.jvp(moved, [primals[index] for index in nonzero], list(changes))[1]

    return outs, _bind(along, [*(tangents[index] for index in nonzero), *primals], len(nonzero))


def _transpose(cotangents, *operands, jaxpr, linear):
    wanted = [index for index, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    avals = [operands[index].aval for index in wanted]
    count = len(cotangents)

    def backward(*operands):
        def forward(*parts):
            whole = [jaxprs.zeros(aval) for aval in jaxpr.in_avals[:linear]]
            for index, part in zip(wanted, parts):
                whole[index] = part
            return jaxpr_as_fun(jaxpr)(*whole, *operands[count:])

        return jax.linear_transpose(forward, *avals)(list(operands[:count]))

    fixed = [*map(ad.instantiate_zeros, cotangents), *operands[linear:]]
    results = dict(zip(wanted, _bind(backward, fixed, count)))
    return [results.get(index) for index in range(len(operands))]


def _batched(operands, axes, *, jaxpr, linear):
    outs = _bind(jax.vmap(jaxpr_as_fun(jaxpr), in_axes=tuple(axes)), operands, linear)
    return outs, [0] * len(outs)


region_p.multiple_results = True
region_p.def_impl(_evaluate)
region_p.def_abstract_eval(lambda *_, jaxpr, linear: jaxpr.out_avals)
mlir.register_lowering(region_p, mlir.lower_fun(_evaluate, multiple_results=True))
mlir.register_lowering(region_p, _lowered, platform="cpu")
ad.primitive_jvps[region_p] = _tangents
ad.primitive_transposes[region_p] = _transpose
batching.primitive_batchers[region_p] = _batched
